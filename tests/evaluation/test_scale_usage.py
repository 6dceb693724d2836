"""Use of the scales: the mean of the weights that the model itself reports."""

import numpy as np
import pytest
import torch

from maha_attn.evaluation.scale_usage import scale_usage
from maha_attn.models import MahaConfig, MahaForCausalLM


@pytest.fixture(scope="module")
def model() -> MahaForCausalLM:
    torch.manual_seed(0)
    config = MahaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_scales=3,
        window=4,
        layer_types=["maha", "full", "maha"],
    )
    return MahaForCausalLM(config).eval()


def test_usage_is_the_mean_over_rows_and_tokens(model: MahaForCausalLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 11, 70)
    usage = scale_usage(model, tokens, length=32, max_rows=5)
    with torch.no_grad():
        rows = torch.from_numpy(tokens[:64].reshape(2, 32))
        weights = model(input_ids=rows, output_fusion_weights=True).fusion_weights
    assert [layer["layer"] for layer in usage] == [0, 2]
    for layer in usage:
        assert layer["strides"] == [1, 2, 4]
        expected = weights[layer["layer"]].mean(dim=(0, 2))
        np.testing.assert_allclose(layer["weights"], expected, atol=1e-6)
        np.testing.assert_allclose(np.sum(layer["weights"], axis=1), 1, atol=1e-5)


def test_short_text_is_one_row(model: MahaForCausalLM) -> None:
    usage = scale_usage(model, np.arange(9), length=32, max_rows=5)
    assert [len(layer["weights"][0]) for layer in usage] == [3, 3]
