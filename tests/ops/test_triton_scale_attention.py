"""The attention kernels against the composed operators; without a GPU, in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is imported.
pytest.importorskip("triton")

from torch.utils.flop_counter import FlopCounterMode

from maha_attn.ops import scale_attention
from maha_attn.ops.multiscale_attention import multiscale_attention
from maha_attn.ops.rotary import rotary_table
from maha_attn.ops.triton import scale_attention as kernels
from maha_attn.ops.triton import scale_attention_tiling as tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
composed = partial(scale_attention.scale_attention, backend="torch")
TINY = tiling._Tiles(16, 16, 4, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small tiles, so that short sequences have several."""
    monkeypatch.setattr(tiling, "_tiles", lambda *_: TINY)


def make(length, keys, width=8, batch=1, dtype=torch.float32):
    torch.manual_seed(length)
    packed = torch.randn(batch, max(length, keys), 3, 2, width, device=DEVICE, dtype=dtype)
    q, k, v = packed.transpose(1, 3).unbind(2)
    return [t.requires_grad_() for t in (q[:, :, :length], k[:, :, :keys], v[:, :, :keys])]


def run(attention, inputs, grad, dtype, **options):
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = attention(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


def compare(inputs, real=None, tolerance=2e-6, **options):
    """Output and gradients; ``real`` ``[B, N]`` says which queries count."""
    grad = torch.randn(inputs[0].shape, device=DEVICE)
    if real is not None:
        grad = grad * real[:, None, :, None]
    ours = run(kernels.scale_attention, inputs, grad, torch.float32, **options)
    truth = run(composed, inputs, grad, torch.float64, **options)
    if real is not None:
        ours[0], truth[0] = (t * real[:, None, :, None] for t in (ours[0], truth[0]))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    return ours


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("window", [1, 5, 33, None])
def test_equals_the_composed_operators(window, stride, causal, narrow, monkeypatch):
    monkeypatch.setattr(tiling, "NARROW_KEYS", 10**9 if narrow else 0)
    for length in (1, 50):
        keys = length // stride if causal else -(-length // stride)
        if keys:
            compare(make(length, keys), window=window, stride=stride, causal=causal)


@pytest.mark.parametrize("width", [16, 24, 40])
def test_any_multiple_of_eight(width):
    compare(make(40, 40, width), window=9)


def test_queries_before_the_first_block():
    q, k, v = make(3, 0)
    out = kernels.scale_attention(q, k, v, stride=4)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((t == 0).all() for t in (out, *grads))


@pytest.mark.parametrize("window", [6, None])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_different_length(stride, window):
    tokens = torch.tensor([40, 17, 1], device=DEVICE)
    real = torch.arange(40, device=DEVICE) < tokens[:, None]
    inputs = make(40, 40 // stride, batch=3)
    lengths = -(-tokens // stride)
    options = {"window": window, "causal": False, "stride": stride, "lengths": lengths}
    clean = compare(inputs, real, **options)
    spoilt = [t.detach().clone() for t in inputs]
    for row, n in enumerate(lengths.tolist()):
        spoilt[1][row, :, n:] = spoilt[2][row, :, n:] = torch.nan
    out = kernels.scale_attention(*spoilt, **options)
    assert torch.equal(out * real[:, None, :, None], clean[0])


def test_a_row_without_keys_gives_zeros():
    inputs = make(20, 20)
    lengths = torch.tensor([0], device=DEVICE)
    out = kernels.scale_attention(*inputs, causal=False, lengths=lengths)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all((t == 0).all() for t in (out, *grads))


def test_low_precision():
    dtype = torch.float16  # The interpreter has no bf16 products; tests/gpu has.
    inputs = make(50, 50, 16, dtype=dtype)
    grad = torch.randn(inputs[0].shape, device=DEVICE)
    ours = run(kernels.scale_attention, inputs, grad, dtype, window=20)
    truth = run(composed, inputs, grad, torch.float64, window=20)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=3e-2, atol=3e-2)


def test_output_lies_as_the_projection_reads_it():
    out = kernels.scale_attention(*make(20, 20))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lengths", [None, [20, 5]])
def test_custom_operator_contract(lengths):
    inputs = make(20, 20, batch=2)
    operator = torch.ops.maha.multiscale_attention.default
    q, k, v = ([t] for t in inputs)
    tables = [] if lengths is None else [rotary_table(torch.arange(20, device=DEVICE), 8)]
    key_table = tables[0] if tables else None
    lengths = [] if lengths is None else [torch.tensor(lengths, device=DEVICE)]
    torch.library.opcheck(operator, (q, k, v, tables, key_table, lengths, [6], [0], [1], True))


def test_flops_are_those_of_the_visited_tiles():
    inputs = make(64, 64)
    with FlopCounterMode(display=False) as counter:
        out = kernels.scale_attention(*inputs, window=16)
    # Tiles of 16 queries see two tiles of keys, the first one its own.
    tiles = 2 * (1 + 2 + 2 + 2) * 16 * 16
    assert counter.get_total_flops() == 4 * 8 * tiles
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Keys are cut by where they start: the last query of each tile's window is one of the next's.
    assert counter.get_total_flops() == 8 * (6 * tiles + 8 * tiles)


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("strides", [[1, 1], [1, 2]], ids=["coarse", "fine"])
def test_every_scale_with_rotary_embedding(strides, width):
    """One operator for all scales, which turns queries and keys itself."""
    lengths, fine = [40, 20], strides[1] > 1
    sides = [make(40 if fine else n, n, width) for n in lengths]
    q, k, v = ([side[i].detach() for side in sides] for i in range(3))
    table = rotary_table(torch.arange(40, device=DEVICE), width)
    halves = rotary_table((torch.arange(40, device=DEVICE) + 1) / 2 - 1, width)
    options = {
        "query_tables": [table, halves if fine else table],
        "key_table": table,
        "windows": [9, None],
        "strides": strides,
        "causal": True,
    }
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        inputs = [[t.to(dtype).requires_grad_() for t in ts] for ts in (q, k, v)]
        outputs, keys = multiscale_attention(*inputs, **options, backend=backend)
        torch.manual_seed(1)
        grads = [torch.randn(o.shape, device=DEVICE).to(dtype) for o in outputs]
        flat = [t for ts in inputs for t in ts]
        results.append([*outputs, *keys, *torch.autograd.grad(outputs, flat, grads)])
        assert not any(key.requires_grad for key in keys)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)
