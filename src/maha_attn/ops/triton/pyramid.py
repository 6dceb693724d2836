# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Kernels for downsampling: strided depthwise convolution and block mean, forward and backward.

Letters as in `maha_attn.ops.pyramid`. Tokens stay where the projections want them, ``[B, N, D]``:
a program takes a tile of coarse tokens and channels and reads the fine tokens that its taps reach,
so nothing is transposed, padded or unfolded in memory. The backward pass writes each fine token's
gradient once, and one partial weight gradient for each strip of tiles, summed afterwards in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.pyramid import coarse_length

_TOKENS, _CHANNELS = 8, 512  # Of a tile.
_STEPS = 4  # Tiles of a strip: as many coarse tokens share one partial weight gradient.


@triton.jit
def _locate(num_tiles, width, STRIP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """``(row, tile, its first coarse tokens [T, 1], channels [1, C])`` of a program."""
    index = tl.program_id(0)
    num_columns = tl.cdiv(width, CHANNELS)
    column, rest = index % num_columns, index // num_columns
    tile, row = rest % num_tiles, rest // num_tiles
    tokens = tile * STRIP + tl.arange(0, TOKENS)[:, None]
    channels = column * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tl.cast(row, tl.int64), tile, tokens, channels


@triton.jit
def _tokens(ptr, tokens, channels, first, end, stride, width):
    """``ptr[tokens, channels]`` in fp32, zero outside ``first ≤ token < end``."""
    mask = (tokens >= first) & (tokens < end) & (channels < width)
    ptr += tl.cast(tokens, tl.int64) * stride + channels
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weight(ptr, tap, channels, width):
    """One tap's weights ``[1, C]`` in fp32."""
    return tl.load(ptr + tap * width + channels, mask=channels < width, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, tokens, channels, end, stride, width, x):
    """Write ``x`` to ``ptr[tokens, channels]``, ``token < end``, in the memory's dtype."""
    ptr += tl.cast(tokens, tl.int64) * stride + channels
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=(tokens < end) & (channels < width))


@triton.jit(do_not_specialize=["length", "coarse", "num_tiles"])
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, lengths_ptr, x_b, x_n, y_b, y_n,
    length, coarse, width, num_tiles,
    RATIO: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``y_j = Σ_i w_i ⊙ x_{rj + r - k + i}``, or the mean of a block's real tokens."""
    row, _, tokens, channels = _locate(num_tiles, width, TOKENS, TOKENS, CHANNELS)
    end = length
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + row).to(tl.int32)
    x_ptr += row * x_b
    y_ptr += row * y_b
    y = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for tap in tl.static_range(TAPS):
        fine = tokens * RATIO + (RATIO - TAPS + tap)
        x = _tokens(x_ptr, fine, channels, 0, length, x_n, width)
        if weight_ptr is not None:
            x *= _weight(weight_ptr, tap, channels, width)
        y += x
    if weight_ptr is None:
        y /= tl.minimum(tl.maximum(end - tokens * RATIO, 1), RATIO).to(tl.float32)
    else:
        y = tl.where(tokens * RATIO < end, y, 0.0)
    _store(y_ptr, tokens, channels, coarse, y_n, width, y)


@triton.jit(do_not_specialize=["length", "coarse", "num_tiles"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, lengths_ptr, dy_b, dy_n, x_b, x_n, dx_b, dx_n,
    length, coarse, width, num_tiles,
    RATIO: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """``dx`` of the fine tokens in a strip of tiles, and the strip's part of ``dw``.

    Fine token ``rj + p`` is tap ``i`` of the coarse token ``j + (k - r + p - i)/r``, if whole.
    """
    row, tile, first, channels = _locate(num_tiles, width, TOKENS * STEPS, TOKENS, CHANNELS)
    end = length
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + row).to(tl.int32)
    real = coarse  # Coarse tokens that are more than the zeros beyond a row's length.
    if weight_ptr is not None:
        real = tl.minimum(coarse, tl.cdiv(end, RATIO))
    dy_ptr += row * dy_b
    x_ptr += row * x_b
    dx_ptr += row * dx_b
    sums = ()  # Grown by + because Triton knows no starred expressions.
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros([TOKENS, CHANNELS], tl.float32),)  # noqa: RUF005
    for step in tl.static_range(STEPS):
        tokens = first + step * TOKENS
        for place in tl.static_range(RATIO):
            dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
            for tap in tl.static_range(TAPS):
                if (TAPS + place - tap) % RATIO == 0:
                    later = tokens + (TAPS - RATIO + place - tap) // RATIO
                    dy = _tokens(dy_ptr, later, channels, 0, real, dy_n, width)
                    if weight_ptr is not None:
                        dy *= _weight(weight_ptr, tap, channels, width)
                    else:
                        dy /= tl.minimum(tl.maximum(end - tokens * RATIO, 1), RATIO).to(tl.float32)
                    dx += dy
            _store(dx_ptr, tokens * RATIO + place, channels, length, dx_n, width, dx)
        if weight_ptr is not None:
            dy = _tokens(dy_ptr, tokens, channels, 0, real, dy_n, width)
            old, sums = sums, ()
            for tap in tl.static_range(TAPS):
                fine = tokens * RATIO + (RATIO - TAPS + tap)
                x = _tokens(x_ptr, fine, channels, 0, length, x_n, width)
                sums = sums + (old[tap] + dy * x,)  # noqa: RUF005
    if weight_ptr is not None:
        partial_ptr += (row * num_tiles + tile) * TAPS * width + channels
        for tap in tl.static_range(TAPS):
            total = tl.sum(sums[tap], 0)[None, :]
            tl.store(partial_ptr + tap * width, total, mask=channels < width)


def downsample(
    x: Tensor,
    weight: Tensor | None,
    *,
    ratio: int,
    method: str,
    causal: bool,
    lengths: Tensor | None = None,
) -> Tensor:
    """`maha_attn.ops.pyramid.downsample` for ``conv`` and ``mean``, differentiable once.

    Numerics: products and sums in fp32, stored in the wider dtype of ``x`` and ``weight``.
    """
    assert (method == "conv") == (weight is not None)
    return _downsample(x, weight, None if causal else lengths, ratio, causal)


@torch.library.custom_op("maha::downsample", mutates_args=())
def _downsample(
    x: Tensor, weight: Tensor | None, lengths: Tensor | None, ratio: int, causal: bool
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = _empty_coarse(x, weight, ratio, causal)
    (batch, length, width), coarse = x.shape, y.shape[1]
    num_tiles = triton.cdiv(coarse, _TOKENS)
    if y.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * num_tiles * triton.cdiv(width, _CHANNELS),)](
                x, None if weight is None else weight.contiguous(), y, lengths,
                *x.stride()[:2], *y.stride()[:2], length, coarse, width, num_tiles,
                **_constants(weight, ratio),
            )  # fmt: skip
    return y


@torch.library.custom_op("maha::downsample_backward", mutates_args=())
def _downsample_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lengths: Tensor | None, ratio: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``weight`` (empty where there is none)."""
    dy, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (dy, x))
    dx = x.new_empty(x.shape)
    (batch, length, width), coarse = x.shape, dy.shape[1]
    num_tiles = triton.cdiv(triton.cdiv(length, ratio), _TOKENS * _STEPS)
    taps = 0 if weight is None else weight.shape[0]
    partial = x.new_empty(batch * num_tiles, taps, width, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(batch * num_tiles * triton.cdiv(width, _CHANNELS),)](
                dy, x, None if weight is None else weight.contiguous(), dx, partial, lengths,
                *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2],
                length, coarse, width, num_tiles, STEPS=_STEPS, **_constants(weight, ratio),
            )  # fmt: skip
    return dx, partial.sum(0).to(x.dtype if weight is None else weight.dtype)


def _constants(weight: Tensor | None, ratio: int) -> dict[str, int]:
    taps = ratio if weight is None else weight.shape[0]
    return {"RATIO": ratio, "TAPS": taps, "TOKENS": _TOKENS, "CHANNELS": _CHANNELS, "num_warps": 8}


def _empty_coarse(x: Tensor, weight: Tensor | None, ratio: int, causal: bool) -> Tensor:
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    batch, length, width = x.shape
    return x.new_empty(batch, coarse_length(length, ratio, causal=causal), width, dtype=dtype)


@_downsample.register_fake
def _(x, weight, lengths, ratio, causal):
    return _empty_coarse(x, weight, ratio, causal)


@_downsample_backward.register_fake
def _(dy, x, weight, lengths, ratio, causal):
    dw = x.new_empty(0, x.shape[2]) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dw


def _save(ctx, inputs, output) -> None:
    x, weight, lengths, *ctx.options = inputs
    ctx.save_for_backward(x, weight, lengths)


def _differentiate(ctx, dy):
    x, weight, lengths = ctx.saved_tensors
    dx, dw = _downsample_backward(dy, x, weight, lengths, *ctx.options)
    return dx, None if weight is None else dw, None, None, None


_downsample.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.maha.downsample)
def _forward_flops(x_shape, weight_shape, lengths, ratio, causal, out_shape=None, **_) -> int:
    taps = ratio if weight_shape is None else weight_shape[0]
    return 2 * taps * coarse_length(x_shape[1], ratio, causal=causal) * x_shape[0] * x_shape[2]


@register_flop_formula(torch.ops.maha.downsample_backward)
def _backward_flops(dy_shape, x_shape, weight_shape, *_, **__) -> int:
    """One product a tap for ``dx``, one for ``dw``."""
    taps = 1 if weight_shape is None else 2 * weight_shape[0]
    return 2 * taps * dy_shape[0] * dy_shape[1] * dy_shape[2]
