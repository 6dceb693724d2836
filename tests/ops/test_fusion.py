"""Fusion: both representations of U agree, the simpler fusions are limits, gradients are right."""

from dataclasses import replace

import pytest
import torch

from maha_attn.layers.fusion import fusion_options
from maha_attn.ops import fusion
from maha_attn.ops.fusion import fuse, fuse_stacked
from maha_attn.ops.pyramid import availability, coarse_length, upsample
from maha_attn.spec import AttentionSpec

OPTIONS = fusion_options(AttentionSpec(hidden_size=2, num_heads=1, ridge=0.05))


def outputs_of(length, *, ratio=2, num_scales=3, causal=True, width=6, dtype=torch.float64):
    torch.manual_seed(length)
    lengths = [length]
    for _ in range(num_scales - 1):
        lengths.append(coarse_length(lengths[-1], ratio, causal=causal))
    return [torch.randn(2, 2, n, width, dtype=dtype) for n in lengths if n]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("method", ["mean", "static", "gate", "convex", "nash"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 9, 31])
def test_tiles_equal_the_upsampled_outputs(monkeypatch, length, method, ratio, causal):
    monkeypatch.setattr(fusion, "_TILE", 16)  # Several: the batch has two rows.
    outputs = outputs_of(length, ratio=ratio, causal=causal)
    strides = tuple(ratio**s for s in range(len(outputs)))
    options = replace(OPTIONS, method=method, ratio=ratio, causal=causal)
    tensors = {
        "logits": torch.randn(2, 2, length, len(outputs)).double(),
        "target": torch.randn(2, 2, length, 6).double(),
        "gram_scale": torch.tensor([0.5, 2.0]).double(),
    }
    fused = fuse(outputs, options, **tensors)
    stacked = torch.stack(
        [
            upsample(u, stride=s, length=length, causal=causal)
            for u, s in zip(outputs, strides, strict=True)
        ],
        3,
    )
    available = availability(strides, length, causal=causal, device=stacked.device)
    expected = fuse_stacked(stacked, available, options, **tensors)
    torch.testing.assert_close(fused.output, expected.output, rtol=0, atol=1e-11)
    torch.testing.assert_close(fused.weights, expected.weights, rtol=0, atol=1e-11)
    assert (fused.weights[..., ~available] == 0).all() if length > 1 else True


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gate"},
        {"method": "convex"},
        {"method": "convex", "temperature": 0.0, "ridge": 1.0},
        {"method": "convex", "temperature": 0.0, "constraint": "capped", "sparsity": 0.1},
        {"method": "convex", "constraint": "capped"},
        {"method": "nash"},
    ],
    ids=str,
)
def test_gradients(monkeypatch, options):
    monkeypatch.setattr(fusion, "_TILE", 8)
    outputs = outputs_of(9)
    logits = torch.randn(2, 2, 9, 3).double()
    target = torch.randn(2, 2, 9, 6).double()
    scale = torch.tensor([0.5, 2.0]).double()
    inputs = [t.requires_grad_() for t in (*outputs, logits, target, scale)]

    def run(*inputs):
        outputs, (logits, target, scale) = inputs[:3], inputs[3:]
        given = {"logits": logits, "target": target, "gram_scale": scale}
        return fuse(outputs, replace(OPTIONS, **options), **given).output

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-4)


def test_a_convex_problem_without_a_gram_matrix_is_a_softmax_gate():
    outputs = outputs_of(20)
    logits = torch.randn(2, 2, 20, 3).double()
    no_gram = {"gram_scale": torch.zeros(2), "logits": logits}
    convex = fuse(outputs, replace(OPTIONS, ridge=1e-12), **no_gram)
    gate = fuse(outputs, replace(OPTIONS, method="gate"), logits=logits)
    torch.testing.assert_close(convex.weights, gate.weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(convex.output, gate.output, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["convex", "nash"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_identical_scales_share_equally(method, temperature):
    u = torch.randn(1, 1, 5, 1, 8).expand(-1, -1, -1, 4, -1)
    options = replace(OPTIONS, method=method, temperature=temperature)
    fused = fuse_stacked(u, torch.ones(5, 4, dtype=torch.bool), options)
    torch.testing.assert_close(fused.weights, fused.weights[..., :1].expand_as(fused.weights))


def test_the_certificate_is_handed_out_and_a_nan_stays_where_it_is():
    outputs = outputs_of(16, dtype=torch.float32)
    clean = fuse(outputs, OPTIONS)
    assert clean.residual.shape == clean.status.shape == (2, 2, 16)
    assert (clean.status == 0).all()
    assert (clean.residual <= 1e-6).all()
    outputs[0][1, 0, 7] = torch.nan
    poisoned = fuse(outputs, OPTIONS)
    bad = torch.zeros(2, 2, 16, dtype=torch.bool)
    bad[1, 0, 7] = True
    assert torch.equal(poisoned.status != 0, bad)
    assert poisoned.output[bad].isnan().all()
    assert torch.equal(poisoned.output[~bad], clean.output[~bad])


def test_half_precision_problems_are_solved_in_fp32():
    outputs = [u.bfloat16() for u in outputs_of(32)]
    fused = fuse(outputs, replace(OPTIONS, method="nash"))
    assert fused.output.dtype == torch.bfloat16
    assert fused.weights.dtype == torch.float32
    assert (fused.residual <= 1e-6).all()
