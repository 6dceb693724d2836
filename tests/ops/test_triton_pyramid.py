"""The pyramid and rotary kernels against the composed operators; interpreted without a GPU."""

import os
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is imported.
pytest.importorskip("triton")

from maha_attn.ops import pyramid
from maha_attn.ops.rotary import rotary_table, rotate
from maha_attn.ops.triton import pyramid as kernels
from maha_attn.ops.triton.rotary import rotate_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
composed = partial(pyramid.build, backend="torch")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small tiles, so that short sequences have several."""
    monkeypatch.setattr(kernels, "_TOKENS", 4)
    monkeypatch.setattr(kernels, "_CHANNELS", 16)
    monkeypatch.setattr(kernels, "_STEPS", 2)


def compare(length, ratio, taps, *, method="conv", causal=True, tokens=None, width=24):
    """Two steps of two streams; every scale has a gradient of its own."""
    torch.manual_seed(length)
    streams = [torch.randn(3, length, width, device=DEVICE) for _ in range(2)]
    lengths = None
    if tokens is not None:
        lengths = torch.tensor(tokens, device=DEVICE)
        real = torch.arange(length, device=DEVICE) < lengths[:, None]
        streams = [torch.where(real[..., None], x, 0) for x in streams]
    conv = method == "conv"
    weights = [torch.randn(taps, width, device=DEVICE) for _ in range(2 if conv else 0)]
    inputs = [t.requires_grad_() for t in (*streams, *weights)]
    options = {"steps": 2, "ratio": ratio, "causal": causal, "lengths": lengths}
    ours = kernels.build(streams, weights, **options)
    truth = composed(streams, weights, method=method, **options)
    ours, truth = ([t for scales in built for t in scales[1:]] for built in (ours, truth))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if not ours:
        return
    grads = [torch.randn_like(t) for t in truth]
    ours, truth = (torch.autograd.grad(t, inputs, grads, allow_unused=True, materialize_grads=True)
                   for t in (ours, truth))  # fmt: skip
    for a, b in zip(ours, truth, strict=True):
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
    x, v = (torch.randn(2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    for weights in ([weight, weight.detach() * 2], []):
        torch.library.opcheck(torch.ops.maha.pyramid.default, ([x, v], weights, None, 2, 2, True))
    table = rotary_table(torch.arange(9, device=DEVICE), 8)
    packed = torch.randn(2, 9, 2, 3, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.maha.rotate.default, (packed, table))


@pytest.mark.parametrize("taps", [3, None])
def test_floating_point_operations_are_counted(taps):
    """Two streams of 8 tokens and 16 channels; 4 and 2 coarse tokens each."""
    streams = [torch.randn(1, 8, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    weights = [
        torch.randn(taps, 16, device=DEVICE, requires_grad=True) for _ in range(2 * bool(taps))
    ]
    with FlopCounterMode(display=False) as forward:
        built = kernels.build(streams, weights, steps=2, ratio=2, causal=True, lengths=None)
    coarse = 2 * (4 + 2) * 16
    assert forward.get_total_flops() == 2 * (taps or 2) * coarse
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad([t.sum() for x in built for t in x[1:]], [*streams, *weights])
    # A product a tap for the tokens, and one for the weight; of a mean one product for the block.
    assert backward.get_total_flops() == 2 * (2 * taps if taps else 1) * coarse


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
