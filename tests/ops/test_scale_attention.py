"""Attention of one scale against the definition of what a query sees, and against SDPA."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maha_attn.ops import reference
from maha_attn.ops.scale_attention import scale_attention


def make(length, keys=None, width=8, dtype=torch.float64, batch=2):
    torch.manual_seed(length)
    keys = length if keys is None else keys
    shapes = [(batch, 2, n, width) for n in (length, keys, keys)]
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)


def twin(q, k, v, lengths=None, **options):
    """The reference over every row and head; rows cut at their real keys."""
    rows = []
    for b in range(q.shape[0]):
        n = k.shape[2] if lengths is None else int(lengths[b])
        heads = [
            reference.attend(q[b, h], k[b, h, :n], v[b, h, :n], **options)
            for h in range(q.shape[1])
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 33])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 131])
def test_equals_the_definition(length, window, stride, causal):
    keys = length // stride if causal else -(-length // stride)
    q, k, v = make(length, keys, batch=1)
    options = {"window": window, "causal": causal, "stride": stride}
    out, expected = scale_attention(q, k, v, **options), twin(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if keys == 0:
        return  # All zeros, whatever the inputs.
    grad = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(o, (q, k, v), grad) for o in (out, expected))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("stride", [1, 2])
def test_bidirectional_lengths(stride, window):
    q, k, v = make(90, -(-90 // stride), batch=3)
    tokens = torch.tensor([90, 51, 8])
    lengths = -(-tokens // stride)
    options = {"window": window, "causal": False, "stride": stride}
    out = scale_attention(q, k, v, lengths=lengths, **options)
    expected = twin(q, k, v, lengths, **options)
    for row, n in enumerate(tokens.tolist()):
        torch.testing.assert_close(out[row, :, :n], expected[row, :, :n], rtol=0, atol=1e-12)
    assert out.isfinite().all()


def test_a_row_without_keys_is_finite():
    q, k, v = make(70, batch=1)
    out = scale_attention(q, k, v, window=6, causal=False, lengths=torch.tensor([0]))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_full_span_is_sdpa():
    q, k, v = make(200, dtype=torch.float32)
    out = scale_attention(q, k, v)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0, atol=1e-6
    )


def test_strided_views_equal_contiguous_inputs():
    x = torch.randn(2, 150, 3, 4, 8)
    q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
    assert not q.is_contiguous()
    for window in (None, 16):
        out = scale_attention(q, k, v, window=window)
        same = scale_attention(q.contiguous(), k.contiguous(), v.contiguous(), window=window)
        torch.testing.assert_close(out, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [16, 128, 200])
def test_a_window_executes_at_most_twice_its_visible_pairs(window):
    q, k, v = (torch.randn(1, 1, 4096, 16) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scale_attention(q, k, v, window=window)
    executed = counter.get_total_flops() / (4 * 16)
    visible = sum(min(i + 1, window) for i in range(4096))
    assert (
        visible <= executed <= 2.2 * visible if window >= 64 else executed <= (64 + window) * 4096
    )
