"""The attention of every scale of a layer as matrices, for texts short enough to look at."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.ops.rotary import rotate


def attention_matrices(layer: MultiscaleAttention, x: Tensor) -> list[Tensor]:
    """``softmax(Q_s K_sᵀ/√K + mask)`` of every scale that the input has (paper Eq. 6).

    Args:
        layer: A layer of the default query resolutions, coarse or fine.
        x: Its input, ``[1, N, D]``.

    Returns:
        ``[H, N_q, N_s]`` a scale; a row is zero where a query sees no key. Computed densely, in
        ``N²`` memory.
    """
    spec = layer.spec
    (scales,) = layer.pyramid.scales([x], None)
    features = layer.pyramid.features(scales, None)
    tokens = torch.arange(x.shape[1], device=x.device)
    table = layer.table(tokens)
    matrices = []
    for s, span in enumerate(spec.spans[: len(scales)]):
        keys = scales[s].shape[1]
        fine = spec.queries == "fine" and s > 0
        q, k = layer.project_qk(s, features[0 if fine else s], features[s])
        q = rotate(q, layer.query_table(s, tokens) if fine else table[:keys], "torch")
        k = rotate(k, table[:keys], "torch")
        scores = torch.einsum("nhk,mhk->hnm", q[0], k[0]) * spec.head_dim**-0.5
        visible = _visible(q.shape[1], keys, spec.strides[s] if fine else 1, span, spec.causal)
        scores = scores.masked_fill(~visible.to(x.device), float("-inf"))
        matrices.append(scores.softmax(-1).nan_to_num(0.0))
    return matrices


def _visible(queries: int, keys: int, stride: int, window: int | None, causal: bool) -> Tensor:
    """The mask of `maha_attn.ops.scale_attention.scale_attention`, ``[N_q, N_s]``."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    last = (i + 1) // stride - 1 if causal else i // stride
    if causal:
        return (last >= j) & (last - j < (window or keys))
    return (last - j).abs() <= (keys if window is None else window // 2)


@torch.inference_mode()
def explain_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    bf16: bool = False,
) -> dict[str, Any]:
    """What each scale attended to in the first, the middle and the last MAHA layer.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: The text's tokens.
        bf16: Run the model in bf16; the matrices are computed in the dtype of its weights.

    Returns:
        ``tokens``: the text's tokens as strings; ``layers``: for each its index ``layer``, and
        ``scales``: ``stride`` and ``attention``, the matrix averaged over heads.
    """
    layers = {
        index: block.attention
        for index, block in enumerate(model.get_submodule("model.layers").children())
        if isinstance(block.attention, MultiscaleAttention) and block.attention.spec.num_scales > 1
    }
    chosen = sorted({list(layers)[i] for i in (0, len(layers) // 2, -1)}) if layers else []
    inputs: dict[int, Tensor] = {}
    hooks = [layers[index].register_forward_pre_hook(_keep(inputs, index)) for index in chosen]
    try:
        tokens = torch.tensor([ids], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model.eval()(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "tokens": [tokenizer.decode([token]) for token in ids],
        "layers": [
            {
                "layer": index,
                "scales": [
                    {"stride": stride, "attention": _rounded(matrix.mean(0))}
                    for stride, matrix in zip(
                        layers[index].spec.strides,
                        attention_matrices(layers[index], inputs[index]),
                        strict=False,
                    )
                ],
            }
            for index in chosen
        ],
    }


def _keep(inputs: dict[int, Tensor], index: int) -> Callable[..., None]:
    """A hook that keeps a layer's input, in the dtype of its weights (autocast)."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[index] = arguments[0].to(next(module.parameters()).dtype)

    return hook


def _rounded(matrix: Tensor) -> list[list[float]]:
    """Three decimals, and a short 0: most of a matrix is."""
    return [[round(value, 3) or 0 for value in row] for row in matrix.tolist()]
