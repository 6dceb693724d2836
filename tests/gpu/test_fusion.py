"""The fusion kernels on the GPU: precision, lengths, determinism, coverage, causality."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from maha_attn.layers.fusion import fusion_options
from maha_attn.ops._qp_certificate import certificate
from maha_attn.ops.fusion import fuse
from maha_attn.ops.pyramid import coarse_length, upsample
from maha_attn.ops.triton import fusion as kernels
from maha_attn.spec import AttentionSpec

pytestmark = pytest.mark.gpu
composed = partial(fuse, backend="torch")
LENGTHS = [1, 2, 7, 127, 128, 129, 1000, 4097, 65537]
OPTIONS = fusion_options(AttentionSpec(hidden_size=2, num_heads=1))
PROBLEMS = {
    "mean": {"method": "mean"},
    "static": {"method": "static"},
    "gate": {"method": "gate"},
    "soft": {"method": "convex"},
    "hard": {"method": "convex", "temperature": 0.0},
    "finest": {"method": "convex"},
    "capped": {"method": "convex", "constraint": "capped", "sparsity": 1.0},
    "hard capped": {
        "method": "convex",
        "constraint": "capped",
        "sparsity": 1.0,
        "temperature": 0.0,
    },
    "nash": {"method": "nash"},
}


def make(
    length,
    problem,
    *,
    dtype=torch.bfloat16,
    batch=2,
    heads=8,
    width=64,
    scales=4,
    causal=True,
    fine=False,
):
    torch.manual_seed(length)
    counts = [length]
    while len(counts) < scales and (count := coarse_length(counts[-1], 2, causal=causal)):
        counts.append(count)
    scales = len(counts)

    def draw(length, channels, dtype, batch=batch):
        drawn = torch.randn(batch, length, heads, channels, device="cuda", dtype=dtype)
        return drawn.transpose(1, 2)

    options = replace(OPTIONS, causal=causal, fine=fine, **PROBLEMS[problem])
    outputs, tensors = [draw(length if fine else n, width, dtype) for n in counts], {}
    if options.method == "static":
        tensors["logits"] = draw(1, scales, torch.float32, batch=1)
    elif options.method != "mean":
        tensors["logits"] = draw(length, scales, torch.float32)
    if options.method == "convex":
        tensors["target"] = outputs[0] if problem == "finest" else draw(length, width, dtype)
        tensors["gram_scale"] = torch.rand(heads, device="cuda") + 0.5
    return outputs, options, tensors


def run(fuse, outputs, options, tensors, dtype=None, counted=None, *, through_weights=False):
    """Output, weights and all gradients, of the tokens that are ``counted``."""
    given, outputs = outputs, [u.detach().to(dtype or u.dtype).requires_grad_() for u in outputs]
    leaves = {
        k: v.detach().to(dtype or v.dtype).requires_grad_()
        for k, v in tensors.items()
        if v is not given[0]
    }
    tensors = {k: leaves.get(k, outputs[0]) for k in tensors}
    fused = fuse(outputs, options, **tensors)
    torch.manual_seed(0)
    upstream = torch.randn(fused.output.shape, device="cuda")
    if counted is not None:
        upstream *= counted[..., None]
    loss = (fused.output * upstream.to(fused.output)).sum()
    if through_weights:
        prices = torch.randn(fused.weights.shape, device="cuda")
        loss = loss + (fused.weights * prices.to(fused.weights)).sum()
    inputs = [*outputs, *leaves.values()]
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


def assert_rule(made, floor=2e-6, **kept):
    """Error at most twice (gradients: three times) that of composed operators in the same dtype."""
    truth = run(composed, *made, torch.float64, **kept)
    plain, ours = run(composed, *made, **kept), run(kernels.fuse, *made, **kept)
    for i, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        rounding = floor if exact.any() else 1e-5  # Products that cancel leave more of it.
        bound = (3 if i > 1 else 2) * error(b, exact) + rounding
        assert error(a, exact) <= bound, (i, float(error(a, exact)), float(bound))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_at_most_twice_the_error_of_low_precision(problem, length):
    # The composed operators in fp64 need the memory: fewer heads in long rows.
    assert_rule(make(length, problem, heads=8 if length < 10_000 else 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [8, 32, 96, 128, 256])
def test_dtypes_and_widths(width, dtype):
    for length in (1, 129, 333):
        assert_rule(make(length, "soft", dtype=dtype, width=width, heads=6), floor=1e-5)


@pytest.mark.parametrize(("problem", "width"), [("nash", 64), ("hard", 96)])
def test_kinks_in_half_precision(problem, width):
    for length in (1, 129, 333):
        assert_rule(make(length, problem, dtype=torch.float16, width=width), floor=1e-5)


@pytest.mark.parametrize(
    ("problem", "form"),
    [
        ("soft", {"causal": False}),
        ("nash", {"causal": False}),
        ("soft", {"fine": True}),
        ("gate", {"fine": True, "causal": False}),
    ],
)
def test_bidirectional_and_fine(problem, form):
    for length in (1, 7, 128, 129, 1000, 4097):
        assert_rule(make(length, problem, **form))


@pytest.mark.parametrize("problem", ["soft", "hard", "nash", "gate"])
def test_gradients_through_the_weights(problem):
    for length in (1, 129, 1000):
        assert_rule(make(length, problem), through_weights=True)


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
            # Of one scale γ's gradient is 0, and what is left of terms that cancel up to 6e-5.
            assert error(a, exact) <= 1e-4


@pytest.mark.parametrize("problem", PROBLEMS)
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


def problems(outputs, options, tensors):
    """``M`` ``[S, S, …]`` and ``q`` ``[S, …]`` of every token, in fp64 (formulation §4)."""
    length, width = outputs[0].shape[2:]
    u = [
        upsample(u.double(), stride=2**s, length=length, causal=options.causal)
        for s, u in enumerate(outputs)
    ]
    dots = [[torch.linalg.vecdot(a, b) * width**-0.5 for b in u] for a in u]
    if options.method == "nash":
        scale, q = 1.0, [dots[s][s] - options.sparsity for s in range(len(u))]
    else:
        scale, y = tensors["gram_scale"].double()[:, None], tensors["target"].double()
        against = torch.stack([torch.linalg.vecdot(a, y) * width**-0.5 for a in u])
        q = against + tensors["logits"].double().movedim(-1, 0) - options.sparsity
    matrix = torch.stack([torch.stack(row) for row in dots]) * scale
    ridge = options.ridge * torch.eye(len(u), device="cuda")[..., None, None, None]
    return matrix + ridge, torch.stack(tuple(q))


@pytest.mark.parametrize("problem", ["soft", "hard", "hard capped", "nash"])
def test_a_million_problems_are_solved(problem):
    """Residuals relative to the numbers of each problem, as `maha_attn.ops.qp` has them."""
    outputs, options, tensors = make(65536, problem, dtype=torch.float32)
    outputs[1][:, :, ::3] = outputs[2].repeat_interleave(2, 2)[:, :, ::3]  # ties
    fused = kernels.fuse(outputs, options, **tensors)
    assert not fused.status.any()
    constraint = "box" if options.method == "nash" else options.constraint
    temperature = 0.0 if options.method == "nash" else options.temperature
    for row in range(2):  # In fp64, the residual of the weights as they are.
        matrix, q = problems(
            [u[row : row + 1] for u in outputs],
            options,
            {k: v if k == "gram_scale" else v[row : row + 1] for k, v in tensors.items()},
        )
        # The first tokens lack scales.
        matrix, q = matrix[..., 7:].flatten(2), q[..., 7:].flatten(1)
        weights = fused.weights[row, :, 7:].double().movedim(-1, 0).flatten(1)
        size = 1 + matrix.diagonal().amax(-1) + q.abs().amax(0)
        claimed = fused.residual[row, :, 7:].flatten()
        assert (claimed <= 1e-6 * size).all()
        residual, _ = certificate(matrix, q, weights, constraint, temperature)
        assert (residual <= 2e-6 * size).all(), float((residual / size).max())


@pytest.mark.usefixtures("much_memory")
def test_offsets_past_two_to_the_31():
    length = 2**21 + 8  # times 1024 channels
    start = length - 64
    outputs, options, _ = make(length, "nash", batch=1, heads=16, scales=2)
    grad = torch.randn_like(outputs[0])
    results = []
    for first in (0, start):
        leaves = [u[:, :, first // 2**s :].detach().requires_grad_() for s, u in enumerate(outputs)]
        fused = kernels.fuse(leaves, options)
        gradients = torch.autograd.grad(fused.output, leaves, grad[:, :, first:])
        # The tail's first token lacks the block before; its own blocks have all their tokens.
        results.append([t[:, :, start + 1 - first :] for t in (*fused[:2], gradients[0])])
        results[-1].append(gradients[1][:, :, (start - first) // 2 :])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
