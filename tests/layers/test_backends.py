"""The layer on kernels equals the layer on PyTorch operators; without a GPU, in the interpreter."""

import dataclasses

import pytest
import torch

from maha_attn import AttentionCache, MultiscaleAttention

pytest.importorskip("triton")
from maha_attn.ops.triton import fusion, operator, pyramid, rotary, scale_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """What the layer makes, kernels read as it lies: `unit_last` has nothing to do."""

    def as_it_lies(t):
        assert t.stride(-1) == 1, f"a copy would be made of {tuple(t.shape)}, {t.stride()}"
        return t

    for module in (fusion, pyramid, rotary, scale_attention):
        monkeypatch.setattr(module, "unit_last", as_it_lies)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "nash", "causal": False},
        {"queries": "fine", "downsample": "mean", "fusion": "gate"},
        {"ratio": 4, "target": "learned", "recompute": True},
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


@pytest.mark.parametrize("options", [{}, {"fusion": "nash"}, {"queries": "fine"}], ids=str)
def test_past_the_dispatcher_as_through_it(make_layer, options, monkeypatch):
    layer = make_layer(backend="triton", **options).to(DEVICE)
    x = torch.randn(2, 21, 16, device=DEVICE, requires_grad=True)

    def step():
        return [y := layer(x), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    straight = step()
    monkeypatch.setattr(operator, "is_watched", lambda arguments: True)
    for a, b in zip(straight, step(), strict=True):
        assert torch.equal(a, b)


def test_compiled_in_one_graph(make_layer):
    torch.compiler.reset()  # Other tests have used up the number of recompilations.
    layer = make_layer(backend="triton").to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 21, 16, device=DEVICE, requires_grad=True)
    inputs = [x, *layer.parameters()]
    ours, expected = (
        [y := module(x), *torch.autograd.grad(y.square().sum(), inputs)]
        for module in (compiled, layer)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["convex", "nash"])
def test_a_second_derivative_is_refused(make_layer, fusion):
    layer = make_layer(backend="triton", fusion=fusion).to(DEVICE)
    x = torch.randn(2, 21, 16, device=DEVICE, requires_grad=True)
    loss = layer(x).square().sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, x, create_graph=True)


LIMITS = [
    ({"ratio": 3}, "fusion's kernel needs a ratio that is a power of 2, got 3"),
    ({"granularity": "sequence", "causal": False}, "has no granularity='sequence'"),
    ({"downsample": "max"}, "the pyramid's kernel has no downsample='max'"),
    ({"downsample": "dense_conv"}, "the pyramid's kernel has no downsample='dense_conv'"),
]


@pytest.mark.parametrize(("options", "reason"), LIMITS, ids=str)
def test_an_option_without_a_kernel_is_an_error_that_says_so(make_layer, options, reason):
    layer = make_layer(backend="triton", **options).to(DEVICE)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{reason}"):
        layer(torch.randn(2, 21, 16, device=DEVICE))


def test_one_scale_needs_neither_pyramid_nor_fusion(make_layer):
    options = {"num_scales": 1, "ratio": 3, "downsample": "max"}
    layer = make_layer(**options, backend="triton").to(DEVICE)
    x = torch.randn(1, 12, 16, device=DEVICE)
    cache = AttentionCache(layer.spec)
    with torch.no_grad():
        y = torch.cat([layer(part, cache=cache) for part in x.split([11, 1], 1)], 1)
        expected = make_layer(**options, backend="torch").to(DEVICE)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_filled_by_kernels(make_layer):
    layer = make_layer(backend="triton").to(DEVICE)
    x = torch.randn(2, 30, 16, device=DEVICE)
    cache = AttentionCache(layer.spec)
    y = torch.cat([layer(part, cache=cache) for part in x.split([17, 1, 12], 1)], 1)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-4)
