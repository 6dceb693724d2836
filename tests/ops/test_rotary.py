"""The two layouts of heads are one rotation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maha_attn.ops.rotary import (
    in_pairs,
    paired_table,
    rotary_table,
    rotate,
    sequence_table,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (255, 1), (257, 4), (1000, 8)])
def test_a_kept_table_is_what_would_be_made(length, stride, paired):
    make = paired_table if paired else rotary_table
    expected = make((torch.arange(length) + 1) / stride - 1, 8, 1e4)
    for _ in range(2):
        options = {"stride": stride, "paired": paired}
        kept = sequence_table(length, 8, 1e4, torch.float32, CPU, **options)
        assert torch.equal(kept, expected)


def test_lengths_share_a_table():
    short, long, longer = (sequence_table(n, 8, 123.0, torch.float32, CPU) for n in (100, 256, 257))
    assert short.data_ptr() == long.data_ptr() != longer.data_ptr()


class Listens(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_is_kept_while_somebody_listens():
    with Listens():
        first, second = (sequence_table(9, 8, 77.0, torch.float32, CPU) for _ in range(2))
    after = sequence_table(9, 8, 77.0, torch.float32, CPU)
    assert len({t.data_ptr() for t in (first, second, after)}) == 3


def test_a_table_of_inference_mode_stays_there():
    with torch.inference_mode():
        inference = sequence_table(9, 8, 55.0, torch.float32, CPU)
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    trained = sequence_table(9, 8, 55.0, torch.float32, CPU)
    assert inference.is_inference()
    rotate(x, trained).sum().backward()
    assert x.grad is not None
