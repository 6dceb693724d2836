"""The pyramid and rotary kernels against the composed operators; interpreted without a GPU."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is imported.
pytest.importorskip("triton")

from maha_attn.ops import pyramid
from maha_attn.ops.rotary import rotary_table, rotate
from maha_attn.ops.triton import pyramid as kernels
from maha_attn.ops.triton.rotary import rotate_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
composed = partial(pyramid.downsample, backend="torch")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small tiles, so that short sequences have several."""
    monkeypatch.setattr(kernels, "_TOKENS", 4)
    monkeypatch.setattr(kernels, "_CHANNELS", 16)
    monkeypatch.setattr(kernels, "_STEPS", 2)


def compare(length, ratio, taps, *, method="conv", causal=True, tokens=None, width=24):
    torch.manual_seed(length)
    x = torch.randn(3, length, width, device=DEVICE)
    lengths = None
    if tokens is not None:
        lengths = torch.tensor(tokens, device=DEVICE)
        real = torch.arange(length, device=DEVICE) < lengths[:, None]
        x = torch.where(real[..., None], x, 0)
    weight = torch.randn(taps, width, device=DEVICE) if method == "conv" else None
    inputs = [t.requires_grad_() for t in (x, weight) if t is not None]
    options = {"ratio": ratio, "method": method, "causal": causal, "lengths": lengths}
    y, truth = (f(x, weight, **options) for f in (kernels.downsample, composed))
    assert y.shape == truth.shape
    if not y.numel():
        return
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, inputs, grad) for t in (y, truth))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("ratio", "taps"), [(2, 3), (2, 2), (3, 6), (4, 4)])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_convolution(length, ratio, taps, causal):
    compare(length, ratio, taps, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_mean(length, causal):
    compare(length, 3, 3, method="mean", causal=causal)


@pytest.mark.parametrize("method", ["conv", "mean"])
def test_rows_of_different_length(method):
    compare(15, 2, 5 if method == "conv" else 2, method=method, causal=False, tokens=[15, 8, 0])


def test_operator_contracts():
    x = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    for w in (weight, None):
        torch.library.opcheck(torch.ops.maha.downsample.default, (x, w, None, 2, True))
    table = rotary_table(torch.arange(9, device=DEVICE), 8)
    packed = torch.randn(2, 9, 2, 3, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.maha.rotate.default, (packed, table))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("width", [8, 24])
def test_rotation_of_a_projection(width, per_row):
    x = torch.randn(2, 9, 2, 3, width, device=DEVICE, requires_grad=True)
    positions = torch.arange(18 if per_row else 9, device=DEVICE)
    table = rotary_table(positions.view(2, 9) if per_row else positions, width)
    ours = rotate_projection(x, table)
    theirs = [rotate(t, table, "torch").transpose(1, 2) for t in x.unbind(2)]
    grad = [torch.randn_like(t) for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    a, b = (torch.autograd.grad(t, x, grad)[0] for t in (ours, theirs))
    torch.testing.assert_close(a, b)
