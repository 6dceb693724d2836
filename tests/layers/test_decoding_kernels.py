"""A step by kernels equals the full pass on PyTorch; without a GPU, in the interpreter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maha_attn import AttentionCache, MultiscaleAttention
from maha_attn.layers import decoding
from maha_attn.layers.graph import GraphedStep

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [
    {},
    {"fusion": "nash", "downsample": "mean"},
    {"queries": "fine", "prior": "none"},
    {"fusion": "gate", "ratio": 3, "num_scales": 2, "bias": True, "preset": "paper"},
    {"target": "learned", "bias": True, "kernel_size": 5, "queries": "fine", "num_scales": 2},
    {"target": "finest", "prior": "static", "constraint": "capped", "temperature": 0.0},
    {"num_scales": 1, "preset": "window"},
]


def twins(make_layer, **options):
    """The same layer on PyTorch operators and on kernels."""
    layer = make_layer(**options).to(DEVICE)
    kernels = MultiscaleAttention(dataclasses.replace(layer.spec, backend="triton")).to(DEVICE)
    kernels.load_state_dict(layer.state_dict())
    return layer, kernels


def filled(layer, kernels, x, mask=None):
    """A cache of the kernels' layer that the other one has filled: interpreted passes are slow."""
    cache = AttentionCache(layer.spec)
    layer(x, mask, cache=cache)
    other = AttentionCache(kernels.spec, cache.capacity)
    other.state, other.seen = cache.state, cache.seen
    return other


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_phase_of_the_cycle(make_layer, options):
    layer, kernels = twins(make_layer, **options)
    x = torch.randn(3, 17, 16, device=DEVICE)
    mask = torch.arange(17, device=DEVICE) >= torch.tensor([[0], [3], [12]], device=DEVICE)
    mask[1, 14] = False
    y, info = layer(x, mask, return_info=True)
    begin = 17 - layer.spec.strides[-1] - 1
    cache = filled(layer, kernels, x[:, :begin], mask[:, :begin])
    for t in range(begin, 17):
        now = slice(t, t + 1)
        step, decided = kernels(x[:, now], mask[:, now], cache=cache, return_info=True)
        torch.testing.assert_close(step, y[:, now], rtol=0, atol=1e-5)
        torch.testing.assert_close(decided.weights, info.weights[:, :, now], rtol=0, atol=1e-4)
        assert (decided.status is None) == (info.status is None)
        assert decided.status is None or not decided.status.any()
    assert cache.ready().lengths.tolist() == mask.sum(1).tolist()
    # The composed operators continue what the kernels wrote.
    again = AttentionCache(layer.spec, cache.capacity)
    again.state, again.seen = cache.state, cache.seen
    more = torch.randn(3, 4, 16, device=DEVICE)
    both = torch.cat((mask, torch.ones_like(mask[:, :4])), 1)
    expected = layer(torch.cat((x, more), 1), both)[:, 17:]
    torch.testing.assert_close(layer(more, cache=again), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_many_parts_and_unused_slots(make_layer):
    """9000 keys in 36 parts; what no token has written is never read."""
    options = {"hidden_size": 8, "num_heads": 1, "num_scales": 1, "preset": "paper"}
    layer, kernels = twins(make_layer, **options)
    x, y = torch.randn(1, 1, 8, device=DEVICE), []
    torch.manual_seed(0)
    past = [torch.randn(1, 1, 9000, 8, device=DEVICE) for _ in range(2)]
    for module, spare in ((layer, 0.0), (kernels, torch.nan)):
        cache = AttentionCache(module.spec, 9100)
        state = cache.reserve(x, 9000)
        for ring, noise in zip((state.keys, state.values), past, strict=True):
            ring.fill_(spare)[:, :, :9000] = noise
        state.lengths += 9000
        cache.seen = 9000
        y.append(module(x, cache=cache))
    torch.testing.assert_close(*y, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_step_can_be_repeated(make_layer):
    for options in ({}, {"gating": True, "dilation": 2, "backend": "torch"}):
        layer, kernels = twins(make_layer)
        layer = make_layer(**options).to(DEVICE)
        kernels = layer if "backend" in options else kernels
        x = torch.randn(2, 16, 16, device=DEVICE)
        cache = filled(layer, kernels, x[:, :15])
        lengths = cache.ready().lengths.clone()
        first = kernels(x[:, 15:], cache=cache)
        cache.ready().lengths.copy_(lengths)
        assert torch.equal(kernels(x[:, 15:], cache=cache), first)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:PyTorch operators run")
def test_a_projection_that_does_more_is_called(make_layer):
    layer = make_layer().to(DEVICE)
    x, calls = torch.randn(1, 8, 16, device=DEVICE), []
    cache = AttentionCache(layer.spec)
    layer(x, cache=cache)
    layer.k_proj[1].register_forward_hook(lambda *_: calls.append(1))
    layer(x[:, :1], cache=cache)
    assert calls


LIMITS = [
    ({"gating": True}, "no gating and no dilation"),
    ({"dilation": 1}, "no gating and no dilation"),
    ({"downsample": "max"}, "no downsample='max'"),
]


def test_what_the_kernels_cannot_do_is_an_error(make_layer):
    layer, x = make_layer(backend="triton").to(DEVICE), torch.randn(1, 1, 16, device=DEVICE)
    assert decoding.has_kernels(layer, x)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="under autocast"):
        decoding.has_kernels(layer, x)
    handle = layer.k_proj[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"linear projections of torch\.float32, without"):
        decoding.has_kernels(layer, x)
    handle.remove()
    layer.q_proj[0] = torch.nn.Sequential(layer.q_proj[0])
    with pytest.raises(ValueError, match="without hooks or adapters"):
        decoding.has_kernels(layer, x)
    for options, reason in LIMITS:
        with pytest.raises(ValueError, match=reason):
            decoding.has_kernels(make_layer(**options, backend="triton").to(DEVICE), x)


def step_arguments(layer, cache, x):
    """What the layer gives the operator."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from maha_attn.ops.triton import decode

        original = decode.decode
        patch.setattr(decode, "decode", lambda *args: seen.append(args) or original(*args))
        layer(x, cache=cache)
    return seen[0]


@torch.no_grad()
def test_as_an_operator(make_layer):
    layer, kernels = twins(make_layer, num_scales=2, hidden_size=8, num_heads=1)
    x = torch.randn(1, 4, 8, device=DEVICE)
    arguments = step_arguments(kernels, filled(layer, kernels, x[:, :3]), x[:, 3:])
    torch.library.opcheck(torch.ops.maha.decode.default, arguments)
    with FlopCounterMode(display=False) as counter:
        torch.ops.maha.decode(*arguments)
    keys = arguments[4]
    # Value, gate of two logits, two queries and two keys, each [8, 8]; all slots of the cache.
    assert counter.get_total_flops() == 2 * 8 * (5 * 8 + 2) + 4 * keys.numel()


@torch.no_grad()
def test_a_compiled_step_is_one_graph(make_layer):
    layer, kernels = twins(make_layer, num_scales=2, hidden_size=8, num_heads=1)
    x = torch.randn(2, 6, 8, device=DEVICE)
    caches = [filled(layer, kernels, x[:, :4]) for _ in range(2)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(token):
        return kernels(token, cache=caches[0])

    for token in x[:, 4:].split(1, 1):
        assert torch.equal(compiled(token), kernels(token, cache=caches[1]))
    for a, b in zip(*(cache.ready().tensors() for cache in caches), strict=True):
        assert torch.equal(a, b)


def test_a_graph_needs_a_gpu_and_a_filled_cache(make_layer):
    layer = make_layer()
    x = torch.randn(1, 1, 16)
    with pytest.raises(ValueError, match="inputs must be on a CUDA device, got one on cpu"):
        GraphedStep(lambda x: x, [x], [AttentionCache(layer.spec)])
    with pytest.raises(ValueError, match="cache is empty"):
        AttentionCache(layer.spec).ready()
