"""Frozen weights: the model itself where they do not move, and its means where they do."""

from typing import Any

import numpy as np
import pytest
import torch

from maha_attn.evaluation.adaptivity import weight_variation
from maha_attn.evaluation.frozen import frozen_weights
from maha_attn.models import MahaConfig, MahaForCausalLM

WINDOWS = np.random.default_rng(0).integers(0, 11, (2, 32))


def model(fusion: str) -> MahaForCausalLM:
    torch.manual_seed(0)
    config = MahaConfig(
        **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "window": 4},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_scales": 3, "fusion": fusion},
        initializer_range=0.3,
    )
    return MahaForCausalLM(config).eval()


def run(one: MahaForCausalLM) -> Any:
    with torch.no_grad():
        return one(input_ids=torch.from_numpy(WINDOWS), output_fusion_weights=True)


def test_a_static_fusion_is_frozen_already() -> None:
    one = model("static")
    with torch.no_grad():
        for block in one.get_submodule("model.layers").children():
            block.attention.fusion.logits.normal_()
    found = weight_variation(one, WINDOWS)
    assert found is not None
    before = run(one).logits
    with frozen_weights(one, found["layers"]):
        frozen = run(one).logits
    torch.testing.assert_close(frozen, before, rtol=0, atol=2e-3)  # Means have four decimals.
    assert torch.equal(run(one).logits, before)


@pytest.mark.parametrize("fusion", ["gate", "convex", "nash"])
def test_every_token_gets_the_mean(fusion: str) -> None:
    one = model(fusion)
    if fusion == "gate":
        with torch.no_grad():
            for block in one.get_submodule("model.layers").children():
                block.attention.fusion.gate_proj.weight.normal_()
    found = weight_variation(one, WINDOWS)
    assert found is not None
    before = run(one).logits
    with frozen_weights(one, found["layers"]):
        frozen = run(one)
    assert (frozen.logits - before).abs().max() > 1e-3
    for weights, layer in zip(frozen.fusion_weights, found["layers"], strict=True):
        mean = torch.tensor(layer["mean"])
        expected = mean[None, :, None].expand_as(weights)
        torch.testing.assert_close(weights[:, :, 3:], expected[:, :, 3:])
        # Without the coarsest scale the others share its weight.
        part = mean[:, :2] * mean.sum(-1, keepdim=True) / mean[:, :2].sum(-1, keepdim=True)
        torch.testing.assert_close(weights[0, :, 1], torch.nn.functional.pad(part, (0, 1)))
