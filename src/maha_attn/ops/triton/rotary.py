# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Rotary embedding of a whole projection: one pass from the projection's memory to the heads'.

Queries and keys of a scale come out of one linear layer, side by side in ``[B, N, 2D]``. This
operator reads that, rotates, and writes ``Q`` and ``K`` apart; its backward pass reads both
gradients and writes them side by side, so that no chunk is ever concatenated again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from maha_attn.ops.triton.memory import unit_last
from maha_attn.ops.triton.operator import operator
from maha_attn.ops.triton.sizes import cdiv, next_power_of_2

_ROWS = 64  # Of a tile: pairs of token and head.


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _rotate_kernel(
    x_ptr, table_ptr, y_ptr, x_b, x_h, x_n, y_b, y_h, y_n, table_b,
    num_rows, num_heads, num_tiles, sign,
    HALF: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``y = (x₁ cos - x₂ sin, x₂ cos + x₁ sin)``; ``sign`` -1 turns back."""
    index = tl.program_id(0)
    row = tl.cast(index // num_tiles, tl.int64)
    rows = (index % num_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    mask = (rows < num_rows) & (columns < HALF)
    tokens, heads = tl.cast(rows // num_heads, tl.int64), rows % num_heads
    x_ptr += row * x_b + tokens * x_n + heads * x_h + columns
    y_ptr += row * y_b + tokens * y_n + heads * y_h + columns
    # The table holds cos, cos, -sin, sin.
    table_ptr += row * table_b + tokens * (4 * HALF) + columns
    cos = tl.load(table_ptr, mask=mask, other=0.0)
    sin = tl.load(table_ptr + 3 * HALF, mask=mask, other=0.0) * sign
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)


def rotate_projection(x: Tensor, table: Tensor) -> list[Tensor]:
    """Rotate each part of a projection.

    Args:
        x: ``[B, N, P, H, K]``, for instance a projection to queries and keys (``P = 2``).
        table: fp32 ``[N, 2, K]`` or ``[B, N, 2, K]`` of `maha_attn.ops.rotary.rotary_table`.

    Returns:
        ``P`` tensors ``[B, H, N, K]``, each over memory of its own, ``[B, N, H, K]``.

    Numerics: computed in fp32, returned in the dtype of ``x``, as `maha_attn.ops.rotary.rotate`.
    """
    return _rotate(x, table)


@operator("maha::rotate")
def _rotate(x: Tensor, table: Tensor) -> list[Tensor]:
    x = unit_last(x)
    outputs = _empty_parts(x)
    for part, y in zip(x.unbind(2), outputs, strict=True):
        turn(part.transpose(1, 2), table, y, 1.0)
    return outputs


@operator("maha::rotate_backward")
def _rotate_backward(grads: list[Tensor], table: Tensor) -> Tensor:
    dx = _empty_packed(grads)
    for grad, part in zip(grads, dx.unbind(2), strict=True):
        turn(unit_last(grad), table, part.transpose(1, 2), -1.0)
    return dx


def turn(x: Tensor, table: Tensor, y: Tensor, sign: float) -> None:
    """Rotate ``x`` into ``y`` (which may be ``x``), both ``[B, H, N, K]`` with unit last stride.

    ``sign`` -1 is the adjoint. The table may be longer than the sequence.
    """
    table = table.contiguous()
    batch, heads, length, half = *x.shape[:3], x.shape[3] // 2
    num_tiles = cdiv(length * heads, _ROWS)
    with torch.cuda.device_of(x):
        _rotate_kernel[(batch * num_tiles,)](
            x, table, y, *x.stride()[:3], *y.stride()[:3],
            table.stride(0) if table.dim() == 4 else 0,
            length * heads, heads, num_tiles, sign,
            HALF=half, PADDED=next_power_of_2(half), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip


def _empty_parts(x: Tensor) -> list[Tensor]:
    batch, length, parts, heads, width = x.shape
    return [x.new_empty(batch, length, heads, width).transpose(1, 2) for _ in range(parts)]


def _empty_packed(grads: list[Tensor]) -> Tensor:
    batch, heads, length, width = grads[0].shape
    return grads[0].new_empty(batch, length, len(grads), heads, width)


@_rotate.register_fake
def _(x, table):
    return _empty_parts(x)


@_rotate_backward.register_fake
def _(grads, table):
    return _empty_packed(grads)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx, grads):
    (table,) = ctx.saved_tensors
    return _rotate_backward(grads, table), None


_rotate.register_autograd(_differentiate, save=_save)
