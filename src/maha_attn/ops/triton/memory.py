"""How the kernels' tensors lie in memory."""

from torch import Tensor


def unit_last(t: Tensor) -> Tensor:
    """``t``, or a copy where its last stride is not 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def empty_by_token(t: Tensor) -> Tensor:
    """Room for another ``t`` ``[B, H, N, C]``, over ``[B, N, H, C]`` memory as projections read."""
    batch, heads, length, width = t.shape
    return t.new_empty(batch, length, heads, width).transpose(1, 2)
