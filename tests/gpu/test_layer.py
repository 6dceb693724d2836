"""The whole layer on kernels: against composed operators, in low precision, captured, compiled."""

# pyright: reportAttributeAccessIssue=false

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from maha_attn import AttentionCache, AttentionSpec, MultiscaleAttention
from maha_attn.ops.rotary import _kept_table
from maha_attn.ops.triton import (
    decode_attention,
    decode_tokens,
    fusion_backward,
    fusion_forward,
    pyramid,
    rotary,
    scale_attention_backward,
    scale_attention_forward,
)

pytestmark = pytest.mark.gpu


def make(**options):
    torch.manual_seed(0)
    options = {"hidden_size": 256, "num_heads": 4, "window": 64} | options
    layer = MultiscaleAttention(AttentionSpec(**options)).cuda()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "proj" in name:
                torch.nn.init.normal_(parameter, std=0.06)
    return layer


def run(layer, x, mask=None, *, backend, dtype=torch.float32):
    """Output, input's gradient, parameters' gradients."""
    other = MultiscaleAttention(dataclasses.replace(layer.spec, backend=backend)).cuda()
    other.load_state_dict(layer.state_dict())
    other.to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = other(x, mask)
    torch.manual_seed(1)
    weights = torch.randn(y.shape, device="cuda")
    return [y, *torch.autograd.grad((y * weights.to(dtype)).sum(), [x, *other.parameters()])]


OPTIONS = [
    {},
    {"recompute": True},
    {"queries": "fine"},
    {"fusion": "nash", "causal": False},
    {"ratio": 4, "num_scales": 3, "temperature": 0.0},
    {"downsample": "mean", "fusion": "gate", "target": "learned"},
    {"gating": True, "dilation": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_composed_operators(options):
    layer = make(**options)
    x = torch.randn(2, 777, 256, device="cuda")
    mask = torch.arange(777, device="cuda") >= torch.tensor([[0], [300]], device="cuda")
    ours = run(layer, x, mask, backend="triton")
    exact = run(layer, x, mask, backend="torch", dtype=torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_at_most_thrice_the_error_of_low_precision(options):
    layer = make(**options)
    x = torch.randn(2, 1000, 256, device="cuda")
    ours, plain = (
        run(layer, x, backend=backend, dtype=torch.bfloat16) for backend in ("triton", "torch")
    )
    exact = run(layer, x, backend="torch", dtype=torch.float64)
    for i, (a, b, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        mine, other = ((t.double() - truth).norm() for t in (a, b))
        assert mine <= (3 if i else 2) * other + 1e-3 * truth.norm()


def test_no_output_depends_on_a_later_token():
    layer = make()
    x = torch.randn(1, 600, 256, device="cuda")
    with torch.no_grad():
        y = layer(x)
        for seen in (1, 7, 8, 9, 63, 64, 65, 127, 128, 255, 256, 257, 512, 599):
            changed = x.clone()
            changed[:, seen:] = 3 * torch.randn_like(changed[:, seen:])
            assert torch.equal(layer(changed)[:, :seen], y[:, :seen]), seen


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
def test_repeats_are_bitwise_equal(options):
    layer = make(**options).bfloat16()
    x = torch.randn(2, 1000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def step():
        return [y := layer(x), *torch.autograd.grad(y.square().sum(), inputs)]

    first = step()
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def test_captured_in_a_graph():
    layer = make().bfloat16()
    x = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def step():
        return torch.autograd.grad(layer(x).square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)
        _kept_table.cache_clear()  # What a graph reads must not be dropped with it.
        torch.cuda.empty_cache()


def test_trains_under_autocast():
    layer = make()
    x = torch.randn(2, 512, 256, device="cuda", requires_grad=True)
    inputs = [x, *layer.parameters()]
    exact = torch.autograd.grad(layer(x).square().sum(), inputs)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(y.float().square().sum(), inputs), exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-3


def compiled_kernels():
    """How many times the kernels have been compiled in this process."""
    device, count = torch.cuda.current_device(), 0
    attention = (scale_attention_forward, scale_attention_backward)
    decoding = (decode_attention, decode_tokens)
    for module in (fusion_forward, fusion_backward, pyramid, rotary, *attention, *decoding):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                count += len(kernel.device_caches[device][0])
    return count


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[3]], ids=str)
def test_other_lengths_and_batches_compile_nothing(options):
    layer = make(window=128, **options).bfloat16()

    def step(batch, length):
        x = torch.randn(batch, length, 256, device="cuda", dtype=torch.bfloat16)
        layer(x.requires_grad_()).sum().backward()

    step(2, 4096)
    before = compiled_kernels()
    for batch, length in ((1, 4097), (3, 5000), (1, 16384), (4, 3001)):
        step(batch, length)
    assert compiled_kernels() == before


@torch.no_grad()
def test_other_contexts_and_batches_compile_nothing_for_a_step():
    layer = make(window=128).bfloat16()

    def step(batch, context):
        x = torch.randn(batch, context + 2, 256, device="cuda", dtype=torch.bfloat16)
        cache = AttentionCache(layer.spec)
        for part in x.split([context, 1, 1], 1):
            layer(part, cache=cache)

    step(2, 300)
    before = compiled_kernels()
    for batch, context in ((1, 4097), (5, 1000), (16, 20000), (3, 77)):
        step(batch, context)
    assert compiled_kernels() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_under_compile():
    layer = make()
    x = torch.randn(2, 300, 256, device="cuda", requires_grad=True)
    inputs = [x, *layer.parameters()]
    compiled = torch.compile(layer, fullgraph=True)
    ours, expected = (
        [y := module(x), *torch.autograd.grad(y.square().sum(), inputs)]
        for module in (compiled, layer)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
