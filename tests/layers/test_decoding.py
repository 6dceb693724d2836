"""A cached sequence, in any chunks, equals one pass over it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maha_attn import AttentionCache, AttentionSpec, MultiscaleAttention
from maha_attn.layers import decoding

HYBRID = {"gating": True, "dilation": 2}
KINDS = [
    {},
    {"fusion": "nash"},
    {"fusion": "gate", "preset": "paper"},
    {"queries": "fine", "downsample": "mean"},
    {"queries": "fine", "preset": "window", "ratio": 3, **HYBRID},
    {"downsample": "max", "num_scales": 4, **HYBRID},
    {"downsample": "dense_conv", "ratio": 3, "kernel_size": 5, "num_scales": 2},
    {"num_scales": 1, "preset": "paper"},
    {"num_scales": 1, "preset": "window"},
]


def run(layer, x, ends, mask=None):
    """Feed ``x`` in chunks that end at ``ends``."""
    cache = AttentionCache(layer.spec)
    outputs, begin = [], 0
    for end in ends:
        part = None if mask is None else mask[:, begin:end]
        outputs.append(layer(x[:, begin:end], part, cache=cache))
        begin = end
    return torch.cat(outputs, 1), cache


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_prefix_then_steps_and_a_chunk(make_layer, options):
    layer = make_layer(std=0.2, **options)
    x = torch.randn(2, 80, 16)
    full = layer(x)
    for prefix in range(1, 71):
        y, _ = run(layer, x, [prefix, prefix + 1, prefix + 2, 80])
        torch.testing.assert_close(y, full, rtol=0, atol=1e-5, msg=lambda m, p=prefix: f"{p}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_chunking_with_padding_anywhere(make_layer, options, data):
    layer = make_layer(std=0.2, **options)
    length = data.draw(st.integers(2, 60))
    ends = [*sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=8))), length]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(3, length, 16)
    mask = torch.rand(3, length) < torch.tensor([[1.0], [0.7], [0.2]])
    y, _ = run(layer, x, ends, mask)
    torch.testing.assert_close(y, layer(x, mask), rtol=0, atol=1e-5)


@torch.no_grad()
def test_long_chunks_are_continued_in_pieces(make_layer, monkeypatch):
    layer = make_layer()
    x = torch.randn(2, 90, 16)
    mask = torch.arange(90) >= torch.tensor([[0], [31]])
    monkeypatch.setattr(decoding, "PIECE", 16)
    y, _ = run(layer, x, [10, 90], mask)
    torch.testing.assert_close(y, layer(x, mask), rtol=0, atol=1e-5)
    cache = AttentionCache(layer.spec)
    layer(x[:, :10], mask[:, :10], cache=cache)
    _, info = layer(x[:, 10:], mask[:, 10:], cache=cache, return_info=True)
    _, whole = layer(x, mask, return_info=True)
    torch.testing.assert_close(info.weights, whole.weights[:, :, 10:], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_rows_can_be_reordered_repeated_and_selected(make_layer, options):
    layer = make_layer(std=0.2, **options)
    x = torch.randn(3, 40, 16)
    mask = torch.arange(40) >= torch.tensor([[0], [7], [22]])
    _, cache = run(layer, x[:, :25], [25], mask[:, :25])
    index = torch.tensor([2, 0, 0, 1])
    expected = layer(x[index], mask[index])[:, 25:]

    picked = copy.deepcopy(cache)
    picked.reorder(index)
    y = layer(x[index, 25:], mask[index, 25:], cache=picked)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)

    wrong = copy.deepcopy(cache)
    wrong.select(torch.tensor([0, 0, 0, 1]))
    y = layer(x[index, 25:], mask[index, 25:], cache=wrong)
    assert (y - expected).abs().max() > 1e-3, "rows in the wrong order must show"

    cache.repeat(2)
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    y = layer(x[index, 25:], mask[index, 25:], cache=cache)
    torch.testing.assert_close(y, layer(x[index], mask[index])[:, 25:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_windowed_cache_does_not_grow_and_the_default_is_small(make_layer):
    layer = make_layer(preset="window")
    x = torch.randn(1, 300, 16)
    _, short = run(layer, x[:, :50], [50])
    _, long = run(layer, x, [50, 300])
    assert long.nbytes == short.nbytes
    layer = make_layer(num_scales=4, window=128, preset="linear")
    x = torch.randn(1, 4096, 16)
    _, cache = run(layer, x, [4096])
    assert cache.ready().keys.shape[2] == 128 * 3 + 4096 // 8


@torch.no_grad()
def test_reset_and_counts(make_layer):
    layer = make_layer()
    x = torch.randn(2, 12, 16)
    mask = torch.arange(12) >= torch.tensor([[0], [5]])
    y, cache = run(layer, x, [12], mask)
    assert cache.get_seq_length() == 12
    assert cache.ready().lengths.tolist() == [12, 7]
    cache.reset()
    assert cache.is_empty
    assert cache.nbytes == 0
    torch.testing.assert_close(layer(x, mask, cache=cache), y, rtol=0, atol=0)


def test_wrong_caches_are_named(make_layer):
    layer, x = make_layer(), torch.randn(2, 12, 16)
    with pytest.raises(ValueError, match="cache belongs to another layer"):
        layer(x, cache=AttentionCache(make_layer(window=6).spec))
    bidirectional = make_layer(causal=False)
    with pytest.raises(ValueError, match="cache needs a causal layer"):
        bidirectional(x, cache=AttentionCache(bidirectional.spec))
    _, cache = run(layer, x, [12])
    with pytest.raises(ValueError, match="x must have 2 rows as the cache has, got 3"):
        layer(torch.randn(3, 1, 16), cache=cache)


def test_a_gradient_through_continued_tokens_is_refused():
    layer = MultiscaleAttention(AttentionSpec(hidden_size=16, num_heads=2, window=4))
    cache = AttentionCache(layer.spec)
    first, second = torch.randn(2, 2, 9, 16)
    layer(first, cache=cache).sum().backward()
    y = layer(second, cache=cache)
    with pytest.raises(RuntimeError, match=r"continue a cache cannot be differentiated; .*no_grad"):
        y.sum().backward()
    with torch.no_grad():
        assert not layer(second, cache=cache).requires_grad


def test_a_cache_belongs_to_one_layer():
    spec = AttentionSpec(hidden_size=16, num_heads=2, window=4)
    layers, cache = [MultiscaleAttention(spec) for _ in range(2)], AttentionCache(spec)
    x = torch.randn(1, 9, 16)
    layers[0](x, cache=cache)
    with pytest.raises(ValueError, match="another layer: make an AttentionCache for each"):
        layers[1](x, cache=cache)
    cache.reset()
    layers[1](x, cache=cache)
    copied = copy.deepcopy((layers[1], cache))
    again = pickle.loads(pickle.dumps((layers[1], cache)))
    for layer, own in (copied, again):
        layer(x, cache=own)
