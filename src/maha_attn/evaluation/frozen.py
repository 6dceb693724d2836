"""What does a fusion gain by looking at the input? The same model with weights that do not move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maha_attn.layers.fusion import ScaleFusion
from maha_attn.ops.fusion import Fused, fuse


@contextmanager
def frozen_weights(model: PreTrainedModel, layers: list[dict[str, Any]]) -> Iterator[None]:
    """Within it, every token of a layer and head is fused by their mean weights ``w̄``.

    Where scales are missing, at the beginning of a text, the others take over their weight in
    proportion; the sum stays that of ``w̄``.

    Args:
        model: A language model.
        layers: Of :func:`maha_attn.evaluation.adaptivity.weight_variation`; weights are not
            negative.
    """
    blocks = list(model.get_submodule("model.layers").children())
    hooks = [
        blocks[layer["layer"]].attention.fusion.register_forward_hook(
            _freeze(torch.tensor(layer["mean"], device=model.device))
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _freeze(mean: Tensor) -> Callable[..., Fused]:
    """A hook that gives the tokens of a `ScaleFusion` the weights ``mean`` ``[H, S]``."""
    logits, total = mean.clamp(min=1e-9).log()[None, :, None], mean.sum(-1)[None, :, None, None]

    def hook(fusion: ScaleFusion, arguments: tuple[Any, ...], fused: Fused) -> Fused:
        outputs, _, _, lengths, *_ = arguments
        shares = fuse(
            outputs,
            replace(fusion.options, method="static"),
            logits=logits[..., : len(outputs)],
            lengths=lengths,
            certified=False,
            backend=fusion.spec.backend,
        )
        output = (shares.output * total).to(fused.output.dtype)
        return shares._replace(output=output, weights=shares.weights * total)

    return hook
