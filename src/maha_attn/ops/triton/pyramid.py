# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Kernels for the pyramid: strided depthwise convolution and block mean, forward and backward.

Letters as in `maha_attn.ops.pyramid`. Tokens stay where the projections want them, ``[B, N, D]``:
a program takes a tile of coarse tokens and channels and reads the fine tokens that its taps reach,
so nothing is transposed, padded or unfolded in memory. The backward pass writes each fine token's
gradient once, and one partial weight gradient for each strip of tiles, summed afterwards in a fixed
order. A warp holds 256 channels of every token of its tile, so that summing over tokens crosses no
warp.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.pyramid import coarse_length
from maha_attn.ops.triton.memory import unit_last
from maha_attn.ops.triton.operator import operator
from maha_attn.ops.triton.sizes import cdiv, next_power_of_2

_TOKENS, _CHANNELS = 2, 1024  # Of a tile.
_STEPS = 16  # Tiles of a strip at most: their coarse tokens share one partial weight gradient.
_PROGRAMS = 1024  # Programs that fill a large GPU; shorter strips where there are fewer.


@triton.jit
def _locate(num_tiles, width, strip, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """``(row, tile, its first coarse tokens [T, 1], channels [1, C])`` of a program."""
    index = tl.program_id(0)
    num_columns = tl.cdiv(width, CHANNELS)
    column, rest = index % num_columns, index // num_columns
    tile, row = rest % num_tiles, rest // num_tiles
    tokens = tile * strip + tl.arange(0, TOKENS)[:, None]
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


@triton.jit(do_not_specialize=["length", "coarse", "num_tiles", "steps"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, direct_ptr, dx_ptr, partial_ptr, lengths_ptr,
    dy_b, dy_n, x_b, x_n, direct_b, direct_n, dx_b, dx_n, length, coarse, width, num_tiles, steps,
    RATIO: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dx`` of the fine tokens in a strip of tiles, and the strip's part of ``dw``.

    Fine token ``rj + p`` is tap ``i`` of the coarse token ``j + (k - r + p - i)/r``, if whole.
    ``direct_ptr``: the gradient that the fine tokens have from elsewhere, added here.
    """
    row, tile, first, channels = _locate(num_tiles, width, TOKENS * steps, TOKENS, CHANNELS)
    end = length
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + row).to(tl.int32)
    real = coarse  # Coarse tokens that are more than the zeros beyond a row's length.
    if weight_ptr is not None:
        real = tl.minimum(coarse, tl.cdiv(end, RATIO))
    dy_ptr += row * dy_b
    x_ptr += row * x_b
    dx_ptr += row * dx_b
    if direct_ptr is not None:
        direct_ptr += row * direct_b
    weights, sums = (), ()  # Grown by + because Triton knows no starred expressions.
    if weight_ptr is not None:
        for tap in tl.static_range(TAPS):
            weights = weights + (_weight(weight_ptr, tap, channels, width),)  # noqa: RUF005
            sums = sums + (tl.zeros([1, CHANNELS], tl.float32),)  # noqa: RUF005
    for step in tl.range(steps):
        tokens = first + step * TOKENS
        dys = ()  # of the coarse tokens j, j + 1, … that have a tap in block j
        for later in tl.static_range((TAPS - 1) // RATIO + 1):
            dy = _tokens(dy_ptr, tokens + later, channels, 0, real, dy_n, width)
            if weight_ptr is None:
                dy /= tl.minimum(tl.maximum(end - tokens * RATIO, 1), RATIO).to(tl.float32)
            dys = dys + (dy,)  # noqa: RUF005
        for place in tl.static_range(RATIO):
            fine = tokens * RATIO + place
            if direct_ptr is not None:
                dx = _tokens(direct_ptr, fine, channels, 0, length, direct_n, width)
            else:
                dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
            for tap in tl.static_range(TAPS):
                if (TAPS + place - tap) % RATIO == 0:
                    dy = dys[(TAPS - RATIO + place - tap) // RATIO]
                    dx += dy if weight_ptr is None else dy * weights[tap]
            _store(dx_ptr, fine, channels, length, dx_n, width, dx)
        if weight_ptr is not None:
            old, sums = sums, ()
            for tap in tl.static_range(TAPS):
                fine = tokens * RATIO + (RATIO - TAPS + tap)
                x = _tokens(x_ptr, fine, channels, 0, length, x_n, width)
                sums = sums + (old[tap] + tl.sum(dys[0] * x, 0)[None, :],)  # noqa: RUF005
    if weight_ptr is not None:
        partial_ptr += (row * num_tiles + tile) * TAPS * width + channels
        for tap in tl.static_range(TAPS):
            tl.store(partial_ptr + tap * width, sums[tap], mask=channels < width)


def build(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    steps: int,
    ratio: int,
    causal: bool,
    lengths: Tensor | None = None,
) -> list[list[Tensor]]:
    """`maha_attn.ops.pyramid.build` for ``conv`` and ``mean`` (no weights), differentiable once.

    Numerics: products and sums in fp32, stored in the dtype of the tokens.
    """
    built = build_scales(
        [unit_last(x) for x in streams],
        [w.contiguous() for w in weights],
        None if causal else lengths,
        steps,
        ratio,
        causal,
    )
    levels = len(built) // len(streams)
    return [[x, *built[i * levels : (i + 1) * levels]] for i, x in enumerate(streams)]


@operator("maha::pyramid")
def build_scales(
    streams: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None,
    steps: int, ratio: int, causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Every coarser scale of the first stream, then of the next, and so on."""
    levels = _empty_levels(streams, steps, ratio, causal)
    for x, built in zip(streams, levels, strict=True):
        for step, y in enumerate(built):
            weight = weights[step] if weights else None
            ends = None if lengths is None else -(-lengths // ratio**step)
            length, coarse = x.shape[1], y.shape[1]
            num_tiles = cdiv(coarse, _TOKENS)
            with torch.cuda.device_of(x):
                _forward_kernel[_programs(num_tiles, x)](
                    x, weight, y, ends, *x.stride()[:2], *y.stride()[:2],
                    length, coarse, x.shape[2], num_tiles, **_constants(x, weight, ratio),
                )  # fmt: skip
            x = y
    return [y for built in levels for y in built]


@operator("maha::pyramid_backward")
def build_backward(
    grads: Sequence[Tensor | None], streams: Sequence[Tensor], built: Sequence[Tensor],
    weights: Sequence[Tensor], lengths: Tensor | None, ratio: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the streams, then of the weights; ``grads`` as `backward_into` takes them."""
    results = [x.new_empty(x.shape) for x in streams]
    gradients = backward_into(results, grads, streams, built, weights, lengths, ratio)
    return [*results, *gradients]


def backward_into(
    results: Sequence[Tensor], grads: Sequence[Tensor | None], streams: Sequence[Tensor],
    built: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, ratio: int,
) -> list[Tensor]:  # fmt: skip
    """Write the streams' gradients to ``results`` (unit last stride); return the weights'.

    Args:
        results: ``[B, N, D]`` each.
        grads: Of every scale of the first stream, the stream itself included; then of the next.
            A scale's own gradient and what comes down from the coarser one are summed in the
            kernel.
        streams, built, weights, lengths, ratio: What `build_scales` took and gave.
    """
    levels = len(built) // len(streams)
    gradients: list[Tensor | None] = [None] * len(weights)
    downs = [grads[i * (levels + 1) + levels] for i in range(len(streams))]
    for step in range(levels - 1, -1, -1):
        ends = None if lengths is None else -(-lengths // ratio**step)
        weight = weights[step] if weights else None
        reached = [i for i, down in enumerate(downs) if down is not None]
        scales = [built[i * levels + step - 1] if step else streams[i] for i in reached]
        partial, parts = _partial_gradients(scales, weight, ratio)
        direct = [grads[i * (levels + 1) + step] for i in range(len(streams))]
        down = list(direct)
        for i, x, part in zip(reached, scales, parts, strict=True):
            down[i] = results[i] if step == 0 else x.new_empty(x.shape)
            _step_backward(downs[i], x, direct[i], weight, down[i], part, ends, ratio)
        if weight is not None and reached:
            gradients[step] = partial.sum(0).to(weight.dtype)
        downs = down
    for result, down in zip(results, downs, strict=True):
        if down is None:
            result.zero_()
        elif down is not result:
            result.copy_(down)
    return [
        torch.zeros_like(weight) if gradient is None else gradient
        for gradient, weight in zip(gradients, weights, strict=True)
    ]


def _partial_gradients(
    scales: Sequence[Tensor], weight: Tensor | None, ratio: int
) -> tuple[Tensor, list[Tensor]]:
    """Room for a weight's gradient, one part a strip of all streams; and each stream's share."""
    taps = 0 if weight is None else weight.shape[0]
    strips = [x.shape[0] * _strips(x, ratio)[0] for x in scales]
    width = scales[0].shape[2] if scales else 0
    partial = torch.empty(
        sum(strips), taps, width, dtype=torch.float32, device=scales[0].device if scales else None
    )
    return partial, list(partial.split(strips))


def _strips(x: Tensor, ratio: int) -> tuple[int, int]:
    """How many strips cut a row of ``x``, and how many tiles make one."""
    tiles = -(-x.shape[1] // (ratio * _TOKENS))
    programs = x.shape[0] * tiles * -(-x.shape[2] // _channels(x))
    steps = max(min(programs // _PROGRAMS, _STEPS), 1)
    return -(-tiles // steps), steps


def _step_backward(
    dy: Tensor, x: Tensor, direct: Tensor | None, weight: Tensor | None, dx: Tensor,
    partial: Tensor, ends: Tensor | None, ratio: int,
) -> None:  # fmt: skip
    """From scale ``s + 1`` to ``s``: fill ``dx`` and the weight's ``partial`` gradients."""
    dy = unit_last(dy)
    direct = None if direct is None else unit_last(direct)
    strips, steps = _strips(x, ratio)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[_programs(strips, x)](
                dy, x, weight, direct, dx, partial, ends, *dy.stride()[:2], *x.stride()[:2],
                *((0, 0) if direct is None else direct.stride()[:2]), *dx.stride()[:2],
                x.shape[1], dy.shape[1], x.shape[2], strips, steps,
                **_constants(x, weight, ratio),
            )  # fmt: skip


def _programs(tiles: int, x: Tensor) -> tuple[int]:
    """The grid for ``tiles`` of each row."""
    return (x.shape[0] * tiles * -(-x.shape[2] // _channels(x)),)


def _channels(x: Tensor) -> int:
    return max(min(_CHANNELS, next_power_of_2(x.shape[2])), 16)


def _constants(x: Tensor, weight: Tensor | None, ratio: int) -> dict[str, int]:
    return {
        "RATIO": ratio,
        "TAPS": ratio if weight is None else weight.shape[0],
        "TOKENS": _TOKENS,
        "CHANNELS": _channels(x),
        "num_warps": max(_channels(x) // 256, 1),
    }


def _empty_levels(
    streams: Sequence[Tensor], steps: int, ratio: int, causal: bool
) -> list[list[Tensor]]:
    """Per stream the scales that it has beyond itself, at most ``steps``."""
    levels = []
    for x in streams:
        batch, length, width = x.shape
        built = []
        while len(built) < steps and (coarse := coarse_length(length, ratio, causal=causal)):
            built.append(x.new_empty(batch, coarse, width))
            length = coarse
        levels.append(built)
    return levels


@build_scales.register_fake
def _(streams, weights, lengths, steps, ratio, causal):
    levels = _empty_levels(streams, steps, ratio, causal)
    return [y for built in levels for y in built]


@build_backward.register_fake
def _(grads, streams, built, weights, lengths, ratio):
    return [t.new_empty(t.shape) for t in (*streams, *weights)]


def _save(ctx, inputs, output) -> None:
    streams, weights, lengths, _, ctx.ratio, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = len(streams), len(weights)
    ctx.save_for_backward(lengths, *streams, *weights, *output)


def _differentiate(ctx, grads):
    lengths, *saved = ctx.saved_tensors
    streams, weights = ctx.counts
    levels = len(grads) // streams
    complete = []
    for i in range(streams):
        complete += [None, *grads[i * levels : (i + 1) * levels]]
    gradients = build_backward(
        complete, saved[:streams], saved[streams + weights :], saved[streams : streams + weights],
        lengths, ctx.ratio,
    )  # fmt: skip
    return gradients[:streams], gradients[streams:], None, None, None, None


build_scales.register_autograd(_differentiate, save=_save)


@register_flop_formula(torch.ops.maha.pyramid, get_raw=True)
def _forward_flops(streams, weights, lengths, steps, ratio, causal, out_val=None, **_) -> int:
    taps = weights[0].shape[0] if weights else ratio
    levels = _empty_levels(streams, steps, ratio, causal)
    return 2 * taps * sum(y.numel() for built in levels for y in built)


@register_flop_formula(torch.ops.maha.pyramid_backward, get_raw=True)
def _backward_flops(grads, streams, built, weights, *_, out_val=None, **__) -> int:
    """One product a tap for ``dx``, one for ``dw``."""
    return 2 * (2 * weights[0].shape[0] if weights else 1) * sum(y.numel() for y in built)
