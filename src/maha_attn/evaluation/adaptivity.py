"""Does fusion adapt? How much the scales' weights vary with the input."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from maha_attn.models import MahaConfig

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.inference_mode()
def weight_variation(
    model: PreTrainedModel, windows: NDArray[np.int64], bf16: bool = False
) -> dict[str, Any] | None:
    """Distribution of the fusion weights ``w`` over the tokens of a text.

    Tokens before the first complete block of the coarsest scale are left out: there the weights
    vary because scales are missing.

    Args:
        model: A causal language model.
        windows: The text, rows of tokens ``[R, N]``.
        bf16: Run the model in bf16.

    Returns:
        ``moved_by_head``: ``E[½ Σ_s |w_s - E w_s|] / Σ_s E w_s`` a layer and head, the share of the
        weight that is not where it is on the average: 0 for a static fusion, at most 1, also where
        weights do not sum to 1 (Nash). ``moved``: its mean; ``moved_by_window``: the windows'
        shares in that, whose mean it is.
        ``layers``: for each layer its index ``layer``, ``strides``, and per head and scale the
        ``mean``, the standard deviation ``sd`` over tokens and the ``quantiles`` (of `QUANTILES`).
        None where no layer has more than one scale, or windows are shorter than one block.
    """
    config = model.config
    assert isinstance(config, MahaConfig)
    first = max(config.attention_spec(i).strides[-1] for i in range(config.num_hidden_layers))
    if first >= windows.shape[1]:
        return None
    collected: dict[int, list[torch.Tensor]] = {}
    for row in windows:
        inputs = torch.from_numpy(row)[None].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            output = model.eval()(input_ids=inputs, use_cache=False, output_fusion_weights=True)
        for layer, weights in enumerate(output.fusion_weights):
            if weights is not None and weights.shape[-1] > 1:
                collected.setdefault(layer, []).append(weights[0, :, first:].float())
    if not collected:
        return None
    layers, moved = [], []
    for layer, parts in collected.items():
        weights = torch.cat(parts, dim=1)
        mean = weights.mean(1, keepdim=True)
        apart = (weights - mean).abs().sum(-1).unflatten(1, (len(parts), -1)).mean(-1) / 2
        moved.append(apart / mean.sum(-1).clamp(min=1e-9))  # [heads, windows]
        levels = torch.tensor(QUANTILES, device=weights.device)
        layers.append(
            {
                "layer": layer,
                "strides": list(config.attention_spec(layer).strides),
                "mean": _rounded(mean[:, 0]),
                "sd": _rounded(weights.std(1)),
                "quantiles": _rounded(_quantiles(weights, levels).permute(1, 2, 0)),
            }
        )
    shares = torch.stack(moved)
    return {
        "moved": shares.mean().item(),
        "moved_by_head": _rounded(shares.mean(-1)),
        "moved_by_window": shares.mean((0, 1)).tolist(),
        "layers": layers,
    }


def _quantiles(weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Over dimension 1, by sorting: ``torch.quantile`` refuses large tensors."""
    ordered = weights.sort(1).values
    places = (levels * (ordered.shape[1] - 1)).round().long()
    return ordered[:, places].movedim(1, 0)


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists with four decimals."""
    if values.dim() == 1:
        return [round(value, 4) for value in values.tolist()]
    return [_rounded(part) for part in values]
