"""The pyramid and rotary kernels on a GPU: precision, lengths, determinism, large offsets."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from maha_attn.ops import pyramid
from maha_attn.ops.rotary import rotary_table, rotate
from maha_attn.ops.triton.pyramid import build
from maha_attn.ops.triton.rotary import rotate_projection

pytestmark = pytest.mark.gpu
composed = partial(pyramid.build, backend="torch")


def by_kernels(*arguments, method, **options):
    return build(*arguments, **options)


def run(operation, x, weights, dtype, **options):
    """Coarser scales, and the gradients when each has one of its own."""
    x, *weights = inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
    ((_, *scales),) = operation([x], weights, steps=2, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    draw = partial(torch.randn, device="cuda", generator=generator)
    if not scales:
        return []
    grads = [draw(y.shape).to(torch.bfloat16).to(dtype) for y in scales]
    used = inputs[: 1 + len(scales)]
    return [*scales, *torch.autograd.grad(scales, used, grads)]


def check(length, dtype, *, ratio=2, taps=3, method="conv", width=72, **options):
    torch.manual_seed(length)
    x = torch.randn(2, length, width, device="cuda", dtype=dtype)
    if (lengths := options.get("lengths")) is not None:
        x *= (torch.arange(length, device="cuda") < lengths[:, None])[..., None]
    weights = [
        torch.randn(taps, width, device="cuda", dtype=dtype) for _ in range(2 * (method == "conv"))
    ]
    options |= {"ratio": ratio, "method": method}
    ours, plain, exact = (
        run(by_kernels, x, weights, dtype, **options),
        run(composed, x, weights, dtype, **options),
        run(composed, x, weights, torch.float64, **options),
    )
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        mine, other = ((t.double() - truth).abs().max() for t in (a, b))
        assert mine <= 2 * other + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", ["conv", "mean"])
def test_lengths(method, causal, dtype):
    for length in (1, 2, 7, 127, 128, 129, 1000, 4097, 65537):
        check(length, dtype, method=method, causal=causal, taps=3 if method == "conv" else 2)


@pytest.mark.parametrize(("ratio", "taps"), [(2, 2), (2, 9), (3, 4), (4, 5)])
def test_ratios_and_taps(ratio, taps):
    check(1001, torch.bfloat16, ratio=ratio, taps=taps, causal=True, width=1024)


@pytest.mark.parametrize("method", ["conv", "mean"])
def test_rows_of_different_length(method):
    options = {"method": method, "causal": False, "taps": 3 if method == "conv" else 2}
    for tokens in ([1000, 129], [7, 0], [1, 4097]):
        lengths = torch.tensor(tokens, device="cuda")
        check(max(tokens), torch.bfloat16, lengths=lengths, **options)


def test_repeats_are_bitwise_equal_and_everything_is_written():
    x = torch.randn(2, 3001, 1024, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    options = {"ratio": 2, "method": "conv", "causal": True}
    first = run(by_kernels, x, weights, torch.bfloat16, **options)
    for _ in range(250):
        again = run(by_kernels, x, weights, torch.bfloat16, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.use_deterministic_algorithms(True)  # Fills fresh memory with NaN.
    try:
        again = run(by_kernels, x, weights, torch.bfloat16, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("much_memory")
def test_offsets_past_two_to_the_31():
    x = torch.randn(1, 2**21 + 300, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    inputs = [t.detach().requires_grad_() for t in (x, x[:, -400:])]
    whole, tail = (build([t], [weight], steps=1, ratio=2, causal=True)[0][1] for t in inputs)
    assert torch.equal(whole[:, -199:], tail[:, 1:])
    grad = torch.randn_like(whole)
    whole, tail = (
        torch.autograd.grad(y, t, grad[:, -y.shape[1] :])[0]
        for y, t in zip((whole, tail), inputs, strict=True)
    )
    assert torch.equal(whole[:, -396:], tail[:, 4:])


@pytest.mark.usefixtures("much_memory")
def test_rotation_at_offsets_past_two_to_the_31():
    packed = torch.randn(1, 2**21 + 300, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    table = rotary_table(torch.arange(packed.shape[1], device="cuda"), 64)
    inputs = [t.detach().requires_grad_() for t in (packed, packed[:, -9:])]
    whole, tail = (rotate_projection(t, table[-t.shape[1] :]) for t in inputs)
    for a, b in zip(whole, tail, strict=True):
        assert torch.equal(a[:, :, -9:], b)
    whole, tail = (
        torch.autograd.grad(y, t, [part.detach() for part in y])[0]
        for y, t in zip((whole, tail), inputs, strict=True)
    )
    assert torch.equal(whole[:, -9:], tail)


def turned(rotation, x, table, grad, dtype):
    """What a rotation makes of every part of ``x``, and the gradient."""
    x = x.detach().to(dtype).requires_grad_()
    parts = rotation(x, table)
    return [*parts, torch.autograd.grad(parts, x, [g.to(dtype) for g in grad])[0]]


def rotate_parts(x, table):
    return [rotate(t, table.to(torch.promote_types(t.dtype, table.dtype)), "torch").transpose(1, 2)
            for t in x.unbind(2)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [40, 64, 96])
def test_rotation(width, dtype):
    for length in (1, 2, 127, 129, 1000, 65537):
        x = torch.randn(2, length, 2, 5, width, device="cuda", dtype=dtype)
        table = rotary_table(torch.arange(length, device="cuda"), width)
        grad = torch.randn(2, 2, 5, length, width, device="cuda", dtype=dtype)
        ours = turned(rotate_projection, x, table, grad, dtype)
        plain = turned(rotate_parts, x, table, grad, dtype)
        exact = turned(rotate_parts, x, table, grad, torch.float64)
        for i, (a, b, truth) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a.dtype == dtype
            mine, other = ((t.double() - truth).abs().max() for t in (a, b))
            assert mine <= (3 if i == 2 else 2) * other + 1e-6 * truth.abs().max()


def test_repeated_rotations_are_bitwise_equal_and_everything_is_written():
    x = torch.randn(2, 1000, 2, 5, 64, device="cuda", dtype=torch.bfloat16)
    table = rotary_table(torch.arange(1000, device="cuda"), 64)
    grad = torch.randn(2, 2, 5, 1000, 64, device="cuda", dtype=torch.bfloat16)
    first = turned(rotate_projection, x, table, grad, torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # Fills fresh memory with NaN.
    try:
        for _ in range(250):
            again = turned(rotate_projection, x, table, grad, torch.bfloat16)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
