"""The chunked loss is the plain one: value, gradients, what it never holds."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from maha_attn.ops.cross_entropy import linear_cross_entropy


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 6, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(31, 6, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(31, (2, 7), generator=generator)
    labels[0, 2:5] = labels[1, 0] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
def test_value_and_gradients(chunk: int) -> None:
    hidden, weight, labels = tensors(torch.float64)
    total, count = linear_cross_entropy(hidden, weight, labels, chunk)
    plain = cross_entropy(linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == 10
    torch.testing.assert_close(total, plain, rtol=1e-12, atol=0)
    for found, expected in zip(
        torch.autograd.grad(total / count, (hidden, weight)),
        torch.autograd.grad(plain / 10, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_half_precision_sums_in_fp32() -> None:
    hidden, weight, labels = tensors(torch.bfloat16)
    total, _ = linear_cross_entropy(hidden, weight, labels, 3)
    logits = linear(hidden, weight).float().flatten(0, 1)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, cross_entropy(logits, labels.flatten(), reduction="sum"))


def test_no_labels() -> None:
    hidden, weight, labels = tensors(torch.float32)
    total, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), 4)
    assert (total, count) == (0, 0)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_never_holds_more_than_a_chunk_of_logits() -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(999, 4, requires_grad=True)
    labels = torch.randint(999, (64,))
    with Largest() as largest:
        total, _ = linear_cross_entropy(hidden, weight, labels, 8)
        total.backward()
    assert largest.elements == 8 * 999
