"""The fusion kernels against the composed operators; without a GPU, in Triton's interpreter."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is imported.
pytest.importorskip("triton")

from torch.utils.flop_counter import FlopCounterMode

from maha_attn.layers.fusion import fusion_options
from maha_attn.ops import fusion as composed
from maha_attn.ops.fusion import FusionOptions
from maha_attn.ops.pyramid import coarse_length
from maha_attn.ops.triton import fusion as kernels
from maha_attn.spec import AttentionSpec

OPTIONS = fusion_options(AttentionSpec(hidden_size=2, num_heads=1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS = {
    "mean": {"method": "mean"},
    "static": {"method": "static", "logits": "static"},
    "gate": {"method": "gate", "logits": "gate"},
    "soft simplex": {"method": "convex", "logits": "gate", "target": "value"},
    "soft capped": {"method": "convex", "target": "value", "constraint": "capped", "sparsity": 0.5},
    "simplex": {"method": "convex", "logits": "gate", "target": "value", "temperature": 0.0},
    "capped": {
        "method": "convex",
        "target": "value",
        "constraint": "capped",
        "temperature": 0.0,
        "sparsity": 0.5,
    },
    "finest": {"method": "convex", "logits": "static", "target": "finest"},
    "nash": {"method": "nash", "sparsity": 0.1},
}
SHAPES = {  # causal, fine, ratio, scales, tokens, heads, width
    "causal": (True, False, 2, 4, 19, 4, 40),
    "bidirectional": (False, False, 4, 3, 17, 1, 8),
    "fine": (True, True, 2, 2, 5, 4, 72),
    "blocks longer than a tile": (True, False, 2, 5, 18, 4, 24),
}


def make(
    shape, problem, dtype=torch.float32, batch=1
) -> tuple[list[torch.Tensor], FusionOptions, dict[str, Any]]:
    """What `fuse` takes: the outputs of the scales, options, and the other tensors."""
    causal, fine, ratio, scales, tokens, heads, width = shape
    torch.manual_seed(tokens)
    counts = [tokens]
    while len(counts) < scales and (count := coarse_length(counts[-1], ratio, causal=causal)):
        counts.append(count)
    scales = len(counts)

    def draw(*size):
        return torch.randn(*size, device=DEVICE).to(dtype).transpose(1, 2)

    outputs = [draw(batch, tokens if fine else count, heads, width) for count in counts]
    problem, tensors = dict(problem), {}
    kind = problem.pop("logits", None)
    if kind is not None:
        rows, length = (batch, tokens) if kind == "gate" else (1, 1)
        tensors["logits"] = draw(rows, length, heads, scales)
    if problem.pop("target", None) == "value":
        tensors["target"] = draw(batch, tokens, heads, width)
    if problem["method"] == "convex":
        tensors["gram_scale"] = torch.rand(heads, device=DEVICE) + 0.5
    return outputs, replace(OPTIONS, ratio=ratio, causal=causal, fine=fine, **problem), tensors


def run(fuse, outputs, options, tensors, dtype, finest=False):
    """Output, weights, and the gradients of a loss that looks at both."""
    outputs = [u.detach().to(dtype).requires_grad_() for u in outputs]
    tensors = {k: v.detach().to(dtype).requires_grad_() for k, v in tensors.items()}
    target = {"target": outputs[0]} if finest else {}
    fused = fuse(outputs, options, **tensors, **target)
    torch.manual_seed(0)
    loss = sum((t * torch.randn(t.shape, device=DEVICE).to(dtype)).sum() for t in fused[:2])
    inputs = [*outputs, *tensors.values()]
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return fused, [fused.output, fused.weights, *gradients]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_composed_operators(name, shape):
    problem = make(SHAPES[shape], PROBLEMS[name])
    finest = name == "finest"
    fused, ours = run(kernels.fuse, *problem, torch.float32, finest)
    _, truth = run(composed.fuse, *problem, torch.float64, finest)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * (1 + b.abs().max().item()))
    if fused.status is not None:
        assert not fused.status.any()
        assert fused.residual.amax() < 1e-5


@pytest.mark.parametrize("length", [1, 2, 8])
def test_short_inputs(length):
    problem = make((True, False, 2, 4, length, 2, 8), PROBLEMS["soft simplex"], batch=2)
    _, ours = run(kernels.fuse, *problem, torch.float32)
    _, truth = run(composed.fuse, *problem, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # The interpreter's, of NaN.
@pytest.mark.parametrize("problem", ["soft simplex", "nash"])
def test_later_tokens_change_nothing(problem):
    outputs, options, tensors = make(SHAPES["causal"], PROBLEMS[problem])
    before = kernels.fuse(outputs, options, **tensors)
    for seen in (1, 7, 8):
        for s, u in enumerate(outputs):
            stride = options.ratio**s
            u[:, :, seen // stride :] = torch.randn_like(u[:, :, seen // stride :])
            u[:, :, -1] = torch.nan
        after = kernels.fuse(outputs, options, **tensors)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, :seen], b[:, :, :seen])
        outputs, options, tensors = make(SHAPES["causal"], PROBLEMS[problem])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_problem_says_so_and_harms_no_other():
    outputs, options, tensors = make(SHAPES["causal"], PROBLEMS["soft simplex"])
    good = kernels.fuse(outputs, options, **tensors)
    outputs[0][0, 1, 4, 3] = torch.nan
    bad = kernels.fuse(outputs, options, **tensors)
    hit = torch.zeros(good.status.shape, dtype=torch.bool, device=DEVICE)
    hit[0, 1, 4] = True
    assert (bad.status[hit] == 3).all()
    assert bad.residual[hit].isnan().all()
    assert bad.weights[hit].isnan().all()
    for a, b in zip(good, bad, strict=True):
        assert torch.equal(a[~hit], b[~hit])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("problem", ["soft simplex", "simplex", "soft capped"])
def test_a_bad_prior_says_so(problem):
    outputs, options, tensors = make(SHAPES["causal"], {**PROBLEMS[problem], "logits": "gate"})
    tensors["logits"][0, 2, 5, 1] = torch.nan
    status = kernels.fuse(outputs, options, **tensors).status
    assert status[0, 2, 5] == 3
    assert (status == 0).sum() == status.numel() - 1


@pytest.mark.parametrize("problem", ["soft simplex", "nash"])
def test_identical_scales_share_their_weight(problem):
    given = PROBLEMS["nash" if problem == "nash" else "finest"]
    outputs, options, tensors = make((False, True, 2, 3, 4, 2, 8), given)
    tensors["logits"] = None
    outputs[1] = outputs[2] = outputs[0]
    weights = kernels.fuse(outputs, options, **tensors).weights
    torch.testing.assert_close(weights, weights[..., :1].expand_as(weights), rtol=1e-4, atol=1e-5)


def test_strides_of_every_kind():
    outputs, options, tensors = make(SHAPES["causal"], PROBLEMS["soft simplex"])
    expected = kernels.fuse(outputs, options, **tensors)
    wide = [torch.randn(*u.shape[:3], 2 * u.shape[3], device=DEVICE) for u in outputs]
    for buffer, u in zip(wide, outputs, strict=True):
        buffer[..., : u.shape[3]] = u
    views = [buffer[..., : u.shape[3]] for buffer, u in zip(wide, outputs, strict=True)]
    views[0] = outputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    tensors["logits"] = tensors["logits"].contiguous()
    tensors["target"] = tensors["target"].contiguous()
    for a, b in zip(kernels.fuse(views, options, **tensors), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("problem", ["gate", "soft simplex"])
def test_as_an_operator(problem):
    outputs, options, given = make((True, False, 2, 3, 6, 2, 8), PROBLEMS[problem])
    tensors = [given.get(k) for k in ("target", "logits", "gram_scale")]
    for t in (*outputs, *tensors):
        if t is not None:
            t.requires_grad_()
    method, box = options.method, options.method == "nash"
    args = (outputs, *tensors, method, "box" if box else "simplex", 2, True, False, False)
    torch.library.opcheck(
        torch.ops.maha.fuse.default, (*args, 1e-2, 0.0, 0.0 if box else 1.0, method != "gate")
    )


def test_floating_point_operations_are_counted():
    outputs, options, tensors = make((True, False, 2, 3, 8, 2, 16), PROBLEMS["soft simplex"])
    with FlopCounterMode(display=False) as counter:
        kernels.fuse(outputs, options, **tensors)
    # Six Gram entries, three products with the target, three terms of the output.
    assert counter.get_total_flops() == 2 * (6 + 3 + 3) * outputs[0].numel()
    # Backward: those entries once more, and five products with each scale's output.
    assert backward_flops(outputs, options, tensors) == 2 * (6 + 15) * outputs[0].numel()
    outputs, options, tensors = make((True, False, 2, 3, 8, 2, 16), PROBLEMS["gate"])
    assert backward_flops(outputs, options, tensors) == 2 * 2 * 3 * outputs[0].numel()


def backward_flops(outputs, options, tensors):
    inputs = [t.requires_grad_() for t in (*outputs, *tensors.values())]
    out = kernels.fuse(outputs, options, **tensors).output
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), inputs)
    return counter.get_total_flops()


def test_low_precision_rounds_once():
    outputs, options, tensors = make(SHAPES["causal"], PROBLEMS["soft simplex"], torch.bfloat16)
    ours = kernels.fuse(outputs, options, **tensors)
    exact = {k: v.double() for k, v in tensors.items()}
    truth = composed.fuse([u.double() for u in outputs], options, **exact)
    assert ours.output.dtype == torch.bfloat16
    torch.testing.assert_close(ours.weights.double(), truth.weights, rtol=1e-4, atol=1e-5)
    ulp = 2**-8 if DEVICE == "cuda" else 2**-7  # The interpreter truncates.
    torch.testing.assert_close(ours.output.double(), truth.output, rtol=ulp, atol=1e-4)
