"""The fusion kernels on the GPU: precision, lengths, determinism, coverage, causality."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from maha_attn.layers.fusion import fusion_options
from maha_attn.ops.fusion import fuse
from maha_attn.ops.pyramid import coarse_length
from maha_attn.ops.triton import fusion as kernels
from maha_attn.spec import AttentionSpec

pytestmark = pytest.mark.gpu
composed = partial(fuse, backend="torch")
LENGTHS = [1, 2, 7, 127, 128, 129, 1000, 4097, 65537]
OPTIONS = fusion_options(AttentionSpec(hidden_size=2, num_heads=1))
PROBLEMS = {
    "mean": {"method": "mean"},
    "gate": {"method": "gate"},
    "soft": {"method": "convex"},
    "hard": {"method": "convex", "temperature": 0.0},
    "capped": {"method": "convex", "constraint": "capped", "sparsity": 1.0},
    "nash": {"method": "nash"},
}


def make(length, problem, *, dtype=torch.bfloat16, batch=2, heads=8, width=64, scales=4):
    torch.manual_seed(length)
    counts = [length]
    while len(counts) < scales and (count := coarse_length(counts[-1], 2, causal=True)):
        counts.append(count)
    scales = len(counts)

    def draw(length, channels, dtype):
        drawn = torch.randn(batch, length, heads, channels, device="cuda", dtype=dtype)
        return drawn.transpose(1, 2)

    options, tensors = replace(OPTIONS, **PROBLEMS[problem]), {}
    if options.method != "mean":
        tensors["logits"] = draw(length, scales, torch.float32)
    if options.method == "convex":
        tensors["target"] = draw(length, width, dtype)
        tensors["gram_scale"] = torch.rand(heads, device="cuda") + 0.5
    return [draw(count, width, dtype) for count in counts], options, tensors


def run(fuse, outputs, options, tensors, dtype=None, counted=None):
    """Output, weights and all gradients, of the tokens that are ``counted``."""
    cast = (lambda t: t.detach().to(dtype)) if dtype else (lambda t: t.detach())
    outputs = [cast(u).requires_grad_() for u in outputs]
    tensors = {k: cast(v).requires_grad_() for k, v in tensors.items()}
    fused = fuse(outputs, options, **tensors)
    torch.manual_seed(0)
    upstream = torch.randn(fused.output.shape, device="cuda")
    if counted is not None:
        upstream *= counted[..., None]
    loss = (fused.output * upstream.to(fused.output)).sum()
    inputs = [*outputs, *tensors.values()]
    return [fused.output, fused.weights, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def error(a, truth):
    """Relative to the truth's size; absolute where that is nothing but rounding."""
    return (a.double() - truth).norm() / truth.norm().clamp(min=0.5)


def same_bounds(a, b):
    """Tokens whose weights are 0 or 1 in both solutions alike.

    Where a weight reaches its bound the derivative jumps, and rounding decides between its sides.
    """
    at_bound = [(w == 0) | (w == 1) for w in (a, b)]
    return (at_bound[0] == at_bound[1]).all(-1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_at_most_twice_the_error_of_low_precision(problem, length):
    # The composed operators in fp64 need the memory: fewer heads in long rows.
    outputs, options, tensors = make(length, problem, heads=8 if length < 10_000 else 2)
    truth = run(composed, outputs, options, tensors, torch.float64)
    plain = run(composed, outputs, options, tensors)
    ours = run(kernels.fuse, outputs, options, tensors)
    for i, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        rounding = 2e-6 if exact.any() else 1e-5  # Products that cancel leave more of it.
        assert error(a, exact) <= (3 if i > 1 else 2) * error(b, exact) + rounding, i


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [8, 32, 96, 128, 256])
def test_dtypes_and_widths(width, dtype):
    outputs, options, tensors = make(333, "soft", dtype=dtype, width=width, heads=6)
    truth = run(composed, outputs, options, tensors, torch.float64)
    ours = run(kernels.fuse, outputs, options, tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for a, exact in zip(ours, truth, strict=True):
        assert error(a, exact) <= tolerance


@pytest.mark.parametrize("scales", [1, 2, 6, 8])
def test_numbers_of_scales(scales):
    for problem in ("soft", "hard", "nash"):
        outputs, options, tensors = make(600, problem, scales=scales, dtype=torch.float32)
        weights = run(composed, outputs, options, tensors, torch.float64)[1]
        counted = same_bounds(run(kernels.fuse, outputs, options, tensors)[1], weights)
        assert counted.float().mean() > 0.999
        truth = run(composed, outputs, options, tensors, torch.float64, counted)
        ours = run(kernels.fuse, outputs, options, tensors, counted=counted)
        for a, exact in zip(ours, truth, strict=True):
            assert error(a, exact) <= 1e-5


@pytest.mark.parametrize("problem", ["soft", "nash"])
def test_repeats_bit_for_bit(problem):
    outputs, options, tensors = make(1000, problem)
    first = run(kernels.fuse, outputs, options, tensors)
    for _ in range(250):
        for a, b in zip(run(kernels.fuse, outputs, options, tensors), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("length", [1, 7, 129, 1000])
def test_every_element_is_written(length):
    torch.use_deterministic_algorithms(True, warn_only=True)  # Fills new memory with NaN.
    try:
        for problem in PROBLEMS:
            outputs, options, tensors = make(length, problem)
            for t in run(kernels.fuse, outputs, options, tensors):
                assert t.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("problem", ["soft", "hard", "nash"])
def test_later_tokens_change_nothing(problem):
    outputs, options, tensors = make(70, problem)
    before = kernels.fuse(outputs, options, **tensors)
    for seen in range(1, 70):
        later = [u.clone() for u in outputs]
        for s, u in enumerate(later):
            u[:, :, seen // 2**s :] = torch.nan
        after = kernels.fuse(later, options, **tensors)
        for a, b in zip(before[:2], after[:2], strict=True):
            assert torch.equal(a[:, :, :seen], b[:, :, :seen])


def test_a_million_problems_are_solved():
    for problem in ("soft", "hard", "nash"):
        outputs, options, tensors = make(65536, problem, dtype=torch.float32)
        outputs[1][:, :, ::3] = outputs[2].repeat_interleave(2, 2)[:, :, ::3]  # ties
        fused = kernels.fuse(outputs, options, **tensors)
        assert not fused.status.any()
        size = 1 + max(u.square().sum(-1).amax() / 8 for u in outputs)
        assert fused.residual.amax() <= 1e-6 * size


def test_offsets_past_two_to_the_31():
    length = 2**21 + 8  # times 1024 channels
    outputs, options, tensors = make(length, "nash", batch=1, heads=16, scales=2)
    whole = kernels.fuse(outputs, options, **tensors)
    start = length - 64
    tail = [u[:, :, start // stride :] for u, stride in zip(outputs, (1, 2), strict=True)]
    part = kernels.fuse(tail, options, **tensors)
    for a, b in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(a[:, :, start + 1 :], b[:, :, 1:])
