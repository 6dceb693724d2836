"""The layer on kernels equals the layer on PyTorch operators; without a GPU, in the interpreter."""

import dataclasses

import pytest
import torch

from maha_attn import AttentionCache, MultiscaleAttention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "nash", "causal": False},
        {"queries": "fine", "downsample": "mean"},
        {"ratio": 3, "fusion": "gate"},
        {"num_scales": 1, "preset": "window"},
    ],
    ids=str,
)
def test_forward_and_every_gradient(make_layer, options):
    layer = make_layer(**options).to(DEVICE)
    kernels = MultiscaleAttention(dataclasses.replace(layer.spec, backend="triton")).to(DEVICE)
    kernels.load_state_dict(layer.state_dict())
    x = torch.randn(2, 21, 16, device=DEVICE, requires_grad=True)
    mask = torch.arange(21, device=DEVICE) >= torch.tensor([[0], [6]], device=DEVICE)
    results = []
    for module in (layer, kernels):
        y, info = module(x, mask, return_info=True)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        results.append((y, info.weights, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_filled_by_kernels(make_layer):
    layer = make_layer(backend="triton").to(DEVICE)
    x = torch.randn(2, 30, 16, device=DEVICE)
    cache = AttentionCache(layer.spec)
    y = torch.cat([layer(part, cache=cache) for part in x.split([17, 1, 12], 1)], 1)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-4)
