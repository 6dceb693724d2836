"""The attention kernels on a GPU: precision, lengths, determinism, offsets, compilation."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from maha_attn.ops.multiscale_attention import multiscale_attention
from maha_attn.ops.rotary import rotary_table
from maha_attn.ops.scale_attention import scale_attention as either
from maha_attn.ops.triton.scale_attention import scale_attention

pytestmark = pytest.mark.gpu
composed = partial(either, backend="torch")
LENGTHS = [1, 2, 7, 127, 128, 129, 1000, 4097]


def make(length, keys, *, batch=2, heads=2, width=64, dtype=torch.bfloat16, seed=0):
    """Queries and keys as views of one projection, ``[B, N, 2D]``, as the layer makes them."""
    g = torch.Generator("cuda").manual_seed(seed)
    packed = torch.randn(batch, max(length, keys), 2, heads, width, device="cuda", generator=g)
    v = torch.randn(batch, keys, heads, width, device="cuda", generator=g)
    q, k = packed.to(dtype).unbind(2)
    inputs = q[:, :length], k[:, :keys], v.to(dtype)
    return [t.transpose(1, 2).requires_grad_() for t in inputs]


def run(attention, inputs, grad, dtype=None, **options):
    """Output and gradients, in ``dtype``."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = attention(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_rule(results, plain, exact, *, real=None):
    """Error at most twice (gradients: three times) that of the plain version in the same dtype."""
    for index, (ours, theirs, truth) in enumerate(zip(results, plain, exact, strict=True)):
        mine, other = ((x.double() - truth).abs() for x in (ours, theirs))
        if real is not None and index == 0:
            mine, other = mine[real], other[real]
        factor = 3 if index else 2
        # Where the truth is 0 (a query of one key has no gradient) the plain version is exact.
        floor = 1e-5 * truth.abs().max().clamp(min=1)
        bound = factor * other.max() + floor
        assert mine.max() <= bound, (index, float(mine.max()), float(other.max()))
        assert mine.norm() <= factor * other.norm() + floor * mine.numel() ** 0.5


def check(length, *, causal, stride=1, lengths=None, real=None, window=None, **made):
    keys = length // stride if causal else -(-length // stride)
    inputs = make(length, keys, **made)
    grad = torch.randn(inputs[0].shape, device="cuda", dtype=inputs[0].dtype)
    if real is not None:
        grad = grad * real[:, None, :, None]
        real = real[:, None].expand(grad.shape[:3])
    options = {"window": window, "causal": causal, "stride": stride, "lengths": lengths}
    results = run(scale_attention, inputs, grad, **options)
    assert all(t.isfinite().all() for t in results)
    if keys == 0:
        assert (results[0] == 0).all()
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # Else it computes in fp32.
    with sdpa_kernel(SDPBackend.MATH):
        plain = run(composed, inputs, grad, **options)
        exact = run(composed, inputs, grad, torch.float64, **options)
    assert_rule(results, plain, exact, real=real)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [128, None])
@pytest.mark.parametrize("stride", [1, 4])
def test_lengths(stride, window, causal):
    for length in LENGTHS:
        check(length, window=window, causal=causal, stride=stride)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 40])
def test_dtypes_and_widths(width, dtype):
    for window in (128, None):
        for length in (7, 129, 1000, 2049):
            check(length, window=window, causal=True, dtype=dtype, width=width)


@pytest.mark.parametrize(("width", "dtype"), [(128, torch.float16), (64, torch.float32)])
def test_dtypes_and_widths_bidirectional(width, dtype):
    for window in (128, None):
        for length in (1, 129, 1000):
            check(length, window=window, causal=False, dtype=dtype, width=width)


@pytest.mark.parametrize("causal", [True, False])
def test_windows(causal):
    for window in (1, 2, 63, 64, 65, 255, 700):
        for stride in (1, 2):
            check(1500, window=window, causal=causal, stride=stride)


@pytest.mark.parametrize("window", [128, 600, None])
def test_rows_of_different_length(window):
    tokens = torch.tensor([1000, 129, 1], device="cuda")
    real = torch.arange(1000, device="cuda") < tokens[:, None]
    for stride in (1, 2):
        lengths = -(-tokens // stride)
        check(1000, window=window, causal=False, stride=stride, lengths=lengths, real=real, batch=3)


def in_pieces(inputs, grad, dtype, *, window, causal, stride):
    """`run` of one row and head by its definition, some queries at a time; sums of them in fp64."""
    q, k, v = (t.detach()[0, 0].to(dtype) for t in inputs)
    grad = grad[0, 0].to(dtype)
    blocks, lead = torch.arange(len(k), device=k.device), int(causal)
    outputs, sums = [], [torch.zeros_like(t, dtype=torch.float64) for t in (q, k, v)]
    for rows in torch.arange(len(q), device=q.device).split(512):
        distance = ((rows + lead) // stride - lead)[:, None] - blocks
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance < window if causal else distance.abs() <= window // 2
        some = seen.any(-1, keepdim=True)
        leaves = [t.clone().requires_grad_() for t in (q[rows], k, v)]
        scores = (leaves[0] @ leaves[1].T / 8).masked_fill(~seen & some, -torch.inf)
        out = torch.where(some, scores.softmax(-1) @ leaves[2], 0)
        outputs.append(out.detach())
        dq, dk, dv = torch.autograd.grad(out, leaves, grad[rows])
        sums[0][rows] = dq.double()
        sums[1] += dk
        sums[2] += dv
    return [t.to(dtype)[None, None] for t in (torch.cat(outputs), *sums)]


@pytest.mark.parametrize(
    ("window", "causal", "stride"),
    [(128, True, 1), (None, True, 1), (128, False, 1), (None, False, 1), (None, True, 4)],
)
def test_a_long_row(window, causal, stride):
    """Every query and key of 65,537 tokens, in fp64."""
    length = 65537
    inputs = make(length, length // stride, batch=1, heads=1)
    grad = torch.randn_like(inputs[0])
    options = {"window": window, "causal": causal, "stride": stride}
    results = run(scale_attention, inputs, grad, **options)
    plain, exact = (
        in_pieces(inputs, grad, dtype, **options) for dtype in (torch.bfloat16, torch.float64)
    )
    assert_rule(results, plain, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [128, None])
@pytest.mark.parametrize("stride", [1, 4])
def test_repeats_are_bitwise_equal(stride, window, causal):
    inputs = make(1500, 1500 // stride, heads=8)
    grad = torch.randn(inputs[0].shape, device="cuda", dtype=torch.bfloat16)
    options = {"window": window, "causal": causal, "stride": stride}
    first = run(scale_attention, inputs, grad, **options)
    for _ in range(250):
        again = run(scale_attention, inputs, grad, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("much_memory")
def test_offsets_past_two_to_the_31():
    length, last = 2**21 + 300, 600
    assert length * 16 * 64 > 2**31
    made = (torch.randn(1, length, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [t.transpose(1, 2) for t in made]
    grad = torch.randn_like(inputs[0])
    whole = run(scale_attention, inputs, grad, window=128)
    tail = run(scale_attention, [t[:, :, -last:] for t in inputs], grad[:, :, -last:], window=128)
    for a, b in zip(whole, tail, strict=True):
        torch.testing.assert_close(a[:, :, -last + 256 :], b[:, :, 256:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [128, None])
def test_every_element_is_written(window):
    """In this mode torch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        lengths = torch.tensor([0, 140], device="cuda")
        inputs = make(333, 333)
        assert torch.empty_like(inputs[0]).isnan().all()
        grad = torch.randn_like(inputs[0])
        options = {"window": window, "causal": False, "lengths": lengths}
        results = run(scale_attention, inputs, grad, **options)
        assert all(t.isfinite().all() for t in results)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [128, None])
@pytest.mark.parametrize("stride", [1, 4])
def test_no_output_depends_on_a_later_token(stride, window):
    length = 520
    q, k, v = make(length, length // stride)
    out = scale_attention(q, k, v, window=window, stride=stride)
    for t in (0, 1, 3, 4, 62, 63, 64, 126, 127, 128, 129, 255, 256, 383, 511, 518):
        future = (t + 1) // stride
        q2, k2, v2 = q.detach().clone(), k.detach().clone(), v.detach().clone()
        q2[:, :, t + 1 :], k2[:, :, future:], v2[:, :, future:] = 7, -50, 1000
        changed = scale_attention(q2, k2, v2, window=window, stride=stride)
        assert torch.equal(out[:, :, : t + 1], changed[:, :, : t + 1]), t


@pytest.mark.parametrize("window", [128, None])
@pytest.mark.parametrize("stride", [1, 4])
def test_nan_in_masked_keys_is_harmless(stride, window):
    inputs = make(400, 400 // stride)
    real = -(-150 // stride)
    lengths = torch.tensor([400 // stride, real], device="cuda")
    grad = torch.randn_like(inputs[0])
    grad[1, :, 150:] = 0
    options = {"window": window, "causal": False, "stride": stride, "lengths": lengths}
    clean = run(scale_attention, inputs, grad, **options)
    spoilt = [t.detach().clone() for t in inputs]
    for t in spoilt[1:]:
        t[1, :, real:] = torch.nan
    for a, b in zip(clean, run(scale_attention, spoilt, grad, **options), strict=True):
        assert torch.equal(a, b)


def test_custom_operator_contract():
    inputs = make(70, 70, dtype=torch.float32)
    q, k, v = ([t] for t in inputs)
    operator = torch.ops.maha.multiscale_attention.default
    table = rotary_table(torch.arange(70, device="cuda"), 64)
    lengths = [torch.tensor([70, 20], device="cuda")]
    torch.library.opcheck(operator, (q, k, v, [], None, [], [15], [0], [1], True))
    torch.library.opcheck(operator, (q, k, v, [table], table, lengths, [15], [0], [1], True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("fine", [False, True])
def test_every_scale_with_rotary_embedding(fine, width, dtype):
    """One operator for all scales, which turns queries and keys itself."""
    made = [make(1000 if fine else n, n, width=width, dtype=dtype) for n in (1000, 500)]
    tokens = torch.arange(1000, device="cuda")
    table = rotary_table(tokens, width)
    options = {
        "query_tables": [table, rotary_table((tokens + 1) / 2 - 1, width) if fine else table],
        "key_table": table,
        "windows": [128, None],
        "strides": [1, 2 if fine else 1],
        "causal": True,
    }
    grads = [torch.randn_like(q) for q, _, _ in made]
    results = []
    for backend, to in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        inputs = [t.detach().to(to).requires_grad_() for side in made for t in side]
        outputs, _ = multiscale_attention(
            inputs[::3], inputs[1::3], inputs[2::3], **options, backend=backend
        )
        grads = [grad.to(to) for grad in grads]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    ours, plain, exact = ([r[1], r[0], *r[2:]] for r in results)
    assert_rule(ours[:1], plain[:1], exact[:1])
    assert_rule(ours[1:], plain[1:], exact[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compile():
    inputs = make(300, 300)
    grad = torch.randn_like(inputs[0])

    @torch.compile(fullgraph=True)
    def compiled(q, k, v):
        return scale_attention(q * 2, k, v, window=128) + 1

    results = run(compiled, inputs, grad)
    expected = run(lambda q, k, v: scale_attention(q * 2, k, v, window=128) + 1, inputs, grad)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
