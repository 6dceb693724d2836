"""A decoding step on a GPU: equal to the full pass at any length, and as a CUDA graph."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from maha_attn import AttentionCache, AttentionSpec, MultiscaleAttention
from maha_attn.layers.graph import GraphedStep

pytestmark = pytest.mark.gpu
KINDS = [
    {},
    {"queries": "fine"},
    {"fusion": "nash", "downsample": "mean"},
    {"fusion": "gate", "ratio": 3, "preset": "paper", "bias": True},
    {"target": "learned", "kernel_size": 5, "temperature": 0.0, "bias": True},
    {"target": "finest", "constraint": "capped", "sparsity": 0.1, "num_scales": 6, "window": 20},
    {"num_scales": 1, "preset": "window"},
]


def make(dtype=torch.float32, **options):
    """A layer whose every part matters: projections as at the start, random fusion and pyramid."""
    torch.manual_seed(0)
    options = {"hidden_size": 256, "num_heads": 4} | options
    layer = MultiscaleAttention(AttentionSpec(**options))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith(("q_proj", "k_proj", "v_proj", "out_proj")):
                p.normal_(std=0.3)
    return layer.to("cuda", dtype)


def twin(layer, dtype=None, **changes):
    """The same layer with another dtype or other options."""
    other = MultiscaleAttention(dataclasses.replace(layer.spec, **changes)).cuda()
    other.load_state_dict(layer.state_dict())
    return other.to(dtype or layer.v_proj.weight.dtype)


def left_padded(rows, length):
    """Rows at different phases: row ``b`` begins with ``b`` tokens of padding, at most 31."""
    padding = torch.arange(rows, device="cuda") % 32
    return torch.arange(length, device="cuda") >= padding[:, None]


def filled(layer, x, mask, capacity=0):
    """A cache that has seen ``x``."""
    cache = AttentionCache(layer.spec, capacity)
    layer(x, mask, cache=cache)
    return cache


def steps(layer, x, mask, begin):
    """The outputs of one step after the other, behind a prompt of ``begin`` tokens."""
    cache = filled(layer, x[:, :begin], mask[:, :begin])
    return torch.cat([layer(token, cache=cache) for token in x[:, begin:].split(1, 1)], 1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:PyTorch operators run, not kernels. fusion's kernel")
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_steps_equal_the_full_pass(options):
    layer = make(**options)
    x, mask = torch.randn(5, 1040, 256, device="cuda"), left_padded(5, 1040)
    exact = twin(layer, torch.float64, backend="torch")(x.double(), mask)
    for begin in (9, 300, 1021):
        end = begin + 19
        y = steps(layer, x[:, :end], mask[:, :end], begin)
        torch.testing.assert_close(y.double(), exact[:, begin:end], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_low_precision_errs_no_more_than_the_full_pass(options, dtype):
    layer = make(dtype, **options)
    x, mask = torch.randn(5, 400, 256, device="cuda", dtype=dtype), left_padded(5, 400)
    exact = twin(layer, torch.float64, backend="torch")(x.double(), mask)[:, 300:]
    plain = twin(layer, backend="torch")(x, mask)[:, 300:]
    y = steps(layer, x, mask, 300)
    mine, other = ((t.double() - exact).abs() for t in (y, plain))
    assert mine.max() <= 2 * other.max(), (mine.max(), other.max())
    assert mine.norm() <= 2 * other.norm(), (mine.norm(), other.norm())


@torch.no_grad()
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (70, 128), (3, 40)])
def test_head_widths_and_rows(rows, width):
    layer = make(hidden_size=4 * width)
    x, mask = torch.randn(rows, 60, 4 * width, device="cuda"), left_padded(rows, 60)
    y = steps(layer, x, mask, 50)
    exact = twin(layer, torch.float64, backend="torch")(x.double(), mask)[:, 50:]
    real = mask[:, 50:]
    torch.testing.assert_close(y.double()[real], exact[real], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("queries", ["coarse", "fine"])
def test_past_65536_tokens(queries):
    """Against PyTorch's operators, whose chunks bound the memory of fp64."""
    layer = make(hidden_size=128, num_heads=2, queries=queries)
    x, mask = torch.randn(2, 65537, 128, device="cuda"), left_padded(2, 65537)
    results = [steps(layer, x, mask, 65528)]
    for dtype in (torch.float32, torch.float64):
        other = twin(layer, dtype, backend="torch")
        cache = AttentionCache(other.spec, 65537)
        for end in (*range(8191, 65528, 8191), 65528, 65537):
            seen = cache.seen
            y = other(x[:, seen:end].to(dtype), mask[:, seen:end], cache=cache)
        results.append(y)
    ours, plain, exact = results
    # At such positions a rotary angle in fp32 is 4e-3 off: both err by that.
    mine, other = ((t.double() - exact).abs().max() for t in (ours, plain))
    assert mine <= 2 * other + 2e-6, (float(mine), float(other))


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_a_graph_equals_eager_steps(options):
    layer = make(torch.bfloat16, **options)
    x = torch.randn(5, 330, 256, device="cuda", dtype=torch.bfloat16)
    mask = left_padded(5, 330)
    eager = steps(layer, x, mask, 300)
    cache = filled(layer, x[:, :300], mask[:, :300], 330)
    before = copy.deepcopy(cache)
    step = GraphedStep(lambda x: layer(x, cache=cache), [x[:, :1]], [cache])
    assert cache.seen == before.seen == 300
    assert torch.equal(cache.ready().lengths, before.ready().lengths)
    graphed = torch.cat([step(x[:, t : t + 1]).clone() for t in range(300, 330)], 1)
    assert torch.equal(graphed, eager)
    with pytest.raises(ValueError, match="room for 330 tokens"):
        step(x[:, :1])
    cache.select(torch.tensor([0]))
    with pytest.raises(ValueError, match="other tensors than were recorded"):
        step(x[:, :1])


@torch.no_grad()
def test_rows_without_a_token_stay_as_they_are():
    layer = make()
    x = torch.randn(4, 30, 256, device="cuda")
    share = torch.tensor([[1.0], [0.7], [0.3], [0.0]], device="cuda")
    mask = torch.rand(4, 30, device="cuda") < share
    cache = AttentionCache(layer.spec)
    chunks = zip(x.split(1, 1), mask.split(1, 1), strict=True)
    y = torch.cat([layer(token, real, cache=cache) for token, real in chunks], 1)
    torch.testing.assert_close(y, layer(x, mask), rtol=0, atol=2e-5)


@torch.no_grad()
def test_repeats_are_bitwise_equal():
    layer = make(torch.bfloat16)
    x = torch.randn(8, 2000, 256, device="cuda", dtype=torch.bfloat16)
    cache = filled(layer, x[:, :-1], left_padded(8, 1999))
    cache.reserve(x, 1)
    lengths = cache.ready().lengths.clone()
    first = layer(x[:, -1:], cache=cache)
    for _ in range(250):
        cache.ready().lengths.copy_(lengths)
        assert torch.equal(layer(x[:, -1:], cache=cache), first)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # Of deterministic mode, about others' operators.
@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_every_element_is_written(options):
    """In this mode torch fills fresh memory with NaN."""
    layer = make(torch.bfloat16, **options)
    x = torch.randn(5, 400, 256, device="cuda", dtype=torch.bfloat16)
    cache = filled(layer, x[:, :-1], left_padded(5, 399), 400)
    lengths = cache.ready().lengths.clone()
    first, decided = layer(x[:, -1:], cache=cache, return_info=True)
    cache.ready().lengths.copy_(lengths)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty_like(x).isnan().all()
        again, info = layer(x[:, -1:], cache=cache, return_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip((again, *info), (first, *decided), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.filterwarnings("ignore:PyTorch operators run, not kernels. the decoding kernels")
@pytest.mark.parametrize("options", [{}, {"gating": True, "dilation": 2}], ids=str)
def test_a_step_does_not_wait_for_the_device(options):
    layer = make(**options, fusion="gate")
    x = torch.randn(3, 40, 256, device="cuda")
    cache = filled(layer, x[:, :38], left_padded(3, 38), 50)
    layer(x[:, :1], cache=cache)  # Compiles.
    mask = torch.tensor([[True], [False], [True]], device="cuda")
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x[:, :1], cache=cache)
        layer(x[:, :1], mask, cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.usefixtures("much_memory")
def test_offsets_past_two_to_the_31():
    layer = make(torch.bfloat16, hidden_size=1024, num_heads=16, num_scales=1, preset="paper")
    x = torch.randn(2, 1, 1024, device="cuda", dtype=torch.bfloat16)
    cache = AttentionCache(layer.spec, 2**20 + 300)
    state = cache.reserve(x, 0)
    assert state.keys.numel() > 2**31
    for tensor in (state.keys, state.values):
        tensor.normal_()
    state.lengths += 2**20 + 77
    cache.seen = 2**20 + 77
    alone = copy.copy(cache)
    alone.select(torch.tensor([1]))
    y = layer(x, cache=cache)
    assert torch.equal(y[1:], layer(x[1:], cache=alone))
    ends = cache.ready().keys[1, :, 2**20 + 76 : 2**20 + 79]
    assert torch.equal(ends, alone.ready().keys[0, :, 2**20 + 76 : 2**20 + 79])


@torch.no_grad()
def test_a_model_generates_as_a_graph_what_it_generates_without():
    models = pytest.importorskip("maha_attn.models")
    config = models.MahaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=2, window=16, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.MahaForCausalLM(config).eval().cuda()
    ids = torch.randint(1, 97, (3, 50), device="cuda")
    expected = model.generate(ids, max_new_tokens=40, eos_token_id=None, do_sample=False)
    uncached = model.generate(
        ids, max_new_tokens=40, eos_token_id=None, do_sample=False, use_cache=False
    )
    assert torch.equal(expected, uncached)
    cache = models.MahaCache(config, 90)
    chosen = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    step = GraphedStep(
        lambda ids: model(ids, past_key_values=cache).logits.argmax(-1), [chosen], cache.layers
    )
    parts = [ids, chosen]
    for _ in range(39):
        parts.append(step(parts[-1]).clone())
    assert torch.equal(torch.cat(parts, 1), expected)
