"""Layers with parameters far from their initial values, so that every part matters."""

from collections.abc import Callable

import pytest
import torch

from maha_attn import AttentionSpec, MultiscaleAttention


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., MultiscaleAttention]:
    """A small layer of random parameters: ``make_layer(window=5, dtype=torch.float64, …)``."""

    def make(*, dtype: torch.dtype = torch.float32, std: float = 0.3, seed: int = 0, **options):
        torch.manual_seed(seed)
        options = {"hidden_size": 16, "num_heads": 2, "num_scales": 3, "window": 5} | options
        layer = MultiscaleAttention(AttentionSpec(**options))
        with torch.no_grad():
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=std)
        return layer.to(dtype)

    return make
