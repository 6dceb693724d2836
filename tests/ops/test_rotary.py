"""The two layouts of heads are one rotation."""

import pytest
import torch

from maha_attn.ops.rotary import in_pairs, paired_table, rotary_table, rotate


def tables(length, head_dim, dtype):
    positions = torch.arange(length)
    return (make(positions, head_dim, dtype=dtype) for make in (rotary_table, paired_table))


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_paired_equals_half_split_with_its_gradient(head_dim):
    halves, pairs = tables(9, head_dim, torch.float64)
    x = torch.randn(2, 9, 3, head_dim, dtype=torch.float64, requires_grad=True)
    expected = in_pairs(rotate(x, halves), head_dim, -1)
    actual = rotate(in_pairs(x, head_dim, -1), pairs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(actual)
    grads = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (actual, expected))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_paired_is_orthogonal_and_keeps_relative_positions():
    _, pairs = tables(40, 8, torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    q, k = rotate(q.clone(), pairs)[0, :, 0], rotate(k.clone(), pairs)[0, :, 0]
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paired_reuses_memory_only_where_nothing_is_differentiated(dtype):
    halves, pairs = tables(5, 4, torch.float32)
    x = torch.randn(1, 5, 2, 4, dtype=dtype)
    expected = in_pairs(rotate(x, halves), 4, -1)
    leaf = in_pairs(x, 4, -1).requires_grad_()
    before = leaf.detach().clone()
    torch.testing.assert_close(rotate(leaf, pairs), expected)
    assert torch.equal(leaf, before)
    memory = before.data_ptr()
    y = rotate(before, pairs)
    torch.testing.assert_close(y, expected)
    assert (y.data_ptr() == memory) == (dtype == torch.float32)
