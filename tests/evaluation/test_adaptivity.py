"""How much the weights move: nothing for a static fusion, something for one that looks."""

from typing import Any

import numpy as np
import pytest
import torch

from maha_attn.evaluation.adaptivity import QUANTILES, weight_variation
from maha_attn.models import MahaConfig, MahaForCausalLM

TOKENS = np.random.default_rng(0).integers(0, 11, 70)


def variation(length: int = 32, **options: Any) -> dict[str, Any] | None:
    torch.manual_seed(0)
    config = MahaConfig(
        **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "window": 4},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_scales": 3, **options},
    )
    windows = TOKENS[: len(TOKENS) // length * length].reshape(-1, length)
    return weight_variation(MahaForCausalLM(config), windows)


def test_a_static_fusion_does_not_move() -> None:
    found = variation(fusion="static")
    assert found is not None
    assert found["moved"] == pytest.approx(0, abs=1e-6)
    for layer in found["layers"]:
        np.testing.assert_allclose(layer["sd"], 0, atol=1e-6)


def test_the_distribution_is_that_of_the_models_weights() -> None:
    found = variation(fusion="nash")
    assert found is not None
    torch.manual_seed(0)
    model = MahaForCausalLM(
        MahaConfig(
            **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "window": 4},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_scales": 3},
            fusion="nash",
        )
    ).eval()
    rows = torch.from_numpy(TOKENS[:64].reshape(2, 32))
    with torch.no_grad():
        both = model(input_ids=rows, output_fusion_weights=True).fusion_weights
    moved = []
    for weights, layer in zip(both, found["layers"], strict=True):
        known = weights[:, :, 4:].transpose(0, 1).flatten(1, 2).numpy()  # [H, tokens, S]
        np.testing.assert_allclose(layer["mean"], known.mean(1), atol=1e-4)
        np.testing.assert_allclose(layer["sd"], known.std(1, ddof=1), atol=1e-4)
        expected = np.quantile(known, QUANTILES, axis=1, method="nearest").transpose(1, 2, 0)
        np.testing.assert_allclose(layer["quantiles"], expected, atol=1e-4)
        apart = np.abs(known - known.mean(1, keepdims=True)).sum(-1).mean(1) / 2
        total = known.sum(-1).mean(1)
        assert (abs(total - 1) > 0.1).all()  # Nash's weights do not sum to 1.
        moved.append(apart / total)
    np.testing.assert_allclose(found["moved_by_head"], moved, atol=1e-4)
    assert found["moved"] == pytest.approx(np.mean(moved), abs=1e-5)
    assert found["moved"] > 0.01
    assert np.mean(found["moved_by_window"]) == pytest.approx(found["moved"])


def test_nothing_to_say() -> None:
    assert variation(num_scales=1) is None
    assert variation(length=4) is None
