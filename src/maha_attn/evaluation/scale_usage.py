"""How much each scale was used: the mean fusion weight per layer, head and scale."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from maha_attn.models import MahaConfig


@torch.inference_mode()
def scale_usage(
    model: PreTrainedModel, tokens: NDArray[np.int64], length: int, max_rows: int
) -> list[dict[str, Any]]:
    """Average the fusion weights over whole windows of a text.

    Returns:
        For every layer with more than one scale: its index ``layer``, the ``strides`` of its
        scales in tokens, and the mean ``weights[head][scale]``. Where a scale has no complete
        block yet, its weight counts as 0.
    """
    config = model.config
    assert isinstance(config, MahaConfig)
    length = min(length, len(tokens))
    rows = min(max_rows, len(tokens) // length)
    sums: dict[int, torch.Tensor] = {}
    for row in tokens[: rows * length].reshape(rows, length):
        inputs = torch.from_numpy(row)[None].to(model.device)
        output = model.eval()(input_ids=inputs, use_cache=False, output_fusion_weights=True)
        for layer, weights in enumerate(output.fusion_weights):
            if weights is not None and weights.shape[-1] > 1:
                mean = weights[0].double().mean(dim=1).cpu()
                sums[layer] = sums.get(layer, 0) + mean / rows
    return [
        {
            "layer": layer,
            "strides": list(config.attention_spec(layer).strides[: weights.shape[-1]]),
            "weights": weights.tolist(),
        }
        for layer, weights in sums.items()
    ]
