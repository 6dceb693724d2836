"""Fusion in one pass: each scale's output is read at its own resolution, once.

Letters as in `maha_attn.ops.fusion`. The operators, their derivative and what they cost; kernels
are in `fusion_forward` and `fusion_backward`. Each output element has one writer and one order of
summation.
"""

# A kernel is called with plain numbers.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.fusion import Fused, FusionOptions
from maha_attn.ops.triton.fusion_backward import backward_kernel
from maha_attn.ops.triton.fusion_forward import forward_kernel
from maha_attn.ops.triton.memory import empty_by_token, unit_last
from maha_attn.ops.triton.operator import operator
from maha_attn.ops.triton.sizes import cdiv, next_power_of_2


class _Tile(NamedTuple):
    """What a program takes: ``heads · tokens`` problems, and their channels by pieces."""

    heads: int
    tokens: int
    piece: int
    loop: bool
    registers: int | None


def _tile(
    kernel: str, method: str, num_heads: int, width: int, scales: int, dtype: torch.dtype
) -> _Tile:
    """Four heads, whose channels lie over eight lanes each: whole lines of memory.

    Eight heads exchange fewer sums, but half lines cost more than that: the mean's backward pass
    took twice as long. Bounding the registers trades spills for more programs at once. Many pieces,
    or those of many scales, are a loop and not unrolled, which would take a minute to compile;
    those of many scales are narrower, to spill less.
    """
    few = scales <= 4
    heads = math.gcd(num_heads, 4)
    lanes = 32 // heads
    lane_bytes = 16 if few else 8
    piece = max(min(lanes * lane_bytes // dtype.itemsize, next_power_of_2(width)), lanes)
    loop = not few or width > 2 * piece
    registers = None
    if kernel == "forward" and few:
        registers = 168 if method == "convex" else 128
    return _Tile(heads, lanes, piece, loop, registers)


def fuse(
    outputs: Sequence[Tensor],
    options: FusionOptions,
    *,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
    certified: bool = True,
) -> Fused:
    """`maha_attn.ops.fusion.fuse` by one kernel, differentiable once; every token has its weights.

    Any memory strides but the last, which is made 1 by a copy where it is not. The output lies in
    memory as ``[B, N, H, K]``, the weights as ``[B, N, H, S]``.

    Args:
        outputs, options, logits, target, gram_scale: As there; the ratio is a power of 2.
            ``target=outputs[0]`` is recognised, not read twice.
        certified: Also return ``residual`` and ``status``.

    Numerics: products, problems and weights in fp32. Gradients are summed in one order.
    """
    method, ratio = options.method, options.ratio
    assert ratio & (ratio - 1) == 0
    convex, nash = method == "convex", method == "nash"
    finest = convex and target is outputs[0]
    if method in ("static", "gate", "convex") and logits is not None:
        batch, heads, length, _ = outputs[0].shape
        logits = logits.expand(batch, heads, length, len(outputs))
    else:
        logits = None
    certified = certified and (convex or nash)
    output, weights, residual, status = _fuse(
        [unit_last(u) for u in outputs],
        unit_last(target) if target is not None and convex and not finest else None,
        logits,
        gram_scale if convex else None,
        method,
        "box" if nash else options.constraint,
        ratio,
        options.causal,
        options.fine,
        finest,
        options.ridge,
        options.sparsity,
        0.0 if nash else options.temperature,
        certified,
    )
    return Fused(output, weights, residual if certified else None, status if certified else None)


@operator("maha::fuse")
def _fuse(
    outputs: Sequence[Tensor], target: Tensor | None, logits: Tensor | None,
    gram_scale: Tensor | None, method: str, constraint: str, ratio: int, causal: bool, fine: bool,
    finest: bool, ridge: float, sparsity: float, temperature: float, certified: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, weights, residual and status; the last two empty unless ``certified``."""
    o, weights, residual, status = _empty_fused(outputs, certified)
    batch, heads, length, width = o.shape
    tile = _tile("forward", method, heads, width, len(outputs), o.dtype)
    num_tiles = cdiv(length + causal, tile.tokens)
    with torch.cuda.device_of(o):
        forward_kernel[(batch * num_tiles * (heads // tile.heads),)](
            tuple(outputs), tuple(_strides(u) for u in outputs), target, _strides(target),
            logits, _strides(logits, 4), gram_scale, o, _strides(o), weights, _strides(weights),
            residual if certified else None, status if certified else None,
            length, heads, num_tiles, width**-0.5, ridge, sparsity, temperature,
            **_constants(method, constraint, temperature, finest, ratio, fine, causal, width, tile),
        )  # fmt: skip
    return o, weights, residual, status


@operator("maha::fuse_backward")
def _fuse_backward(
    do: Tensor, dw: Tensor | None, outputs: Sequence[Tensor], target: Tensor | None,
    gram_scale: Tensor | None, weights: Tensor, method: str, constraint: str, ratio: int,
    causal: bool, fine: bool, finest: bool, ridge: float, temperature: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the outputs, then those that ``needs`` names of target, logits, gram_scale."""
    do = unit_last(do)
    (batch, heads, length, width), shift = do.shape, int(causal)
    tile = _tile("backward", method, heads, width, len(outputs), outputs[0].dtype)
    num_tiles = cdiv(length + shift, tile.tokens)
    du = [empty_by_token(u) for u in outputs]
    dy, dlogits, dgamma = _small_gradients(do, target, weights, gram_scale, needs)
    shares = {}  # of blocks longer than a tile: one row a tile
    for s, u in enumerate(outputs):
        tiles = ratio**s // tile.tokens
        if tiles > 1 and not fine:
            rows = (u.shape[2] + shift) * tiles
            shares[s] = do.new_zeros(batch, rows, heads, width, dtype=torch.float32).transpose(1, 2)
    gamma_shares = None
    if dgamma is not None:
        gamma_shares = dgamma.new_empty(batch * num_tiles, heads, dtype=torch.float32)
    written = [shares.get(s, gradient) for s, gradient in enumerate(du)]
    with torch.cuda.device_of(do):
        backward_kernel[(batch * num_tiles * (heads // tile.heads),)](
            do, _strides(do), dw, _strides(dw, 4),
            tuple(outputs), tuple(_strides(u) for u in outputs),
            target, _strides(target), gram_scale, weights, _strides(weights),
            tuple(written), tuple(_strides(t) for t in written), dy, _strides(dy),
            dlogits, _strides(dlogits, 4), gamma_shares,
            length, heads, num_tiles, width**-0.5, ridge, temperature,
            **_constants(method, constraint, temperature, finest, ratio, fine, causal, width, tile),
            # Gradients of half of the tokens at a time spill 32 bytes a lane at most, of all at
            # once up to 464 (S=4, bf16, sm_90); the finest scale as target is faster at once.
            PARTS=1 if finest or len(outputs) > 4 else 2,
        )  # fmt: skip
    for s, share in shares.items():
        blocks = share.unflatten(2, (du[s].shape[2] + shift, -1))[:, :, shift:]
        du[s].copy_(blocks.sum(3))
    if dgamma is not None and gamma_shares is not None:
        dgamma.copy_(gamma_shares.sum(0))
    return [*du, *(t for t in (dy, dlogits, dgamma) if t is not None)]


def _constants(
    method: str, constraint: str, temperature: float, finest: bool, ratio: int, fine: bool,
    causal: bool, width: int, tile: _Tile,
) -> dict[str, object]:  # fmt: skip
    """What a kernel is compiled for, the same for both."""
    return {
        "METHOD": method,
        "CONSTRAINT": constraint,
        "SOFT": temperature > 0,
        "FINEST": finest,
        "RATIO": ratio,
        "FINE": fine,
        "SHIFT": int(causal),
        "WIDTH": width,
        "HEADS": tile.heads,
        "TOKENS": tile.tokens,
        "PIECE": tile.piece,
        "LOOP": tile.loop,
        "num_warps": 1,
        "maxnreg": tile.registers,
    }


def _strides(t: Tensor | None, count: int = 3) -> tuple[int, ...] | None:
    return None if t is None else t.stride()[:count]


def _empty_fused(
    outputs: Sequence[Tensor], certified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u = outputs[0]
    weights = u.new_empty(*u.shape[::2], u.shape[1], len(outputs), dtype=torch.float32)
    shape = u.shape[:3] if certified else (0,)
    residual = u.new_empty(shape, dtype=torch.float32)
    return (
        empty_by_token(u),
        weights.transpose(1, 2),
        residual,
        residual.new_empty(shape, dtype=torch.int8),
    )


def _small_gradients(
    do: Tensor, target: Tensor | None, weights: Tensor, gram_scale: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Room for the gradients of target, logits and gram_scale that ``needs`` names."""
    return [
        empty_by_token(target) if needs[0] and target is not None else None,
        empty_by_token(weights) if needs[1] else None,
        torch.empty_like(gram_scale) if needs[2] and gram_scale is not None else None,
    ]


@_fuse.register_fake
def _(
    outputs,
    target,
    logits,
    gram_scale,
    method,
    constraint,
    ratio,
    causal,
    fine,
    finest,
    ridge,
    sparsity,
    temperature,
    certified,
):
    return _empty_fused(outputs, certified)


@_fuse_backward.register_fake
def _(
    do,
    dw,
    outputs,
    target,
    gram_scale,
    weights,
    method,
    constraint,
    ratio,
    causal,
    fine,
    finest,
    ridge,
    temperature,
    needs,
):
    small = _small_gradients(do, target, weights, gram_scale, needs)
    return [*(empty_by_token(u) for u in outputs), *(t for t in small if t is not None)]


def _save(ctx, inputs, output) -> None:
    outputs, target, logits, gram_scale, *options = inputs
    _, weights, residual, status = output
    ctx.mark_non_differentiable(residual, status)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*outputs, target, gram_scale, weights)
    ctx.needs = [t is not None and t.requires_grad for t in (target, logits, gram_scale)]
    ctx.logits_dtype = None if logits is None else logits.dtype
    # Neither the sparsity nor whether certificates were asked for matters to the derivative.
    ctx.options = (*options[:7], options[8])


def _differentiate(ctx, do, dw, *_):
    *outputs, target, gram_scale, weights = ctx.saved_tensors
    if do is None and dw is None:
        return (None,) * 14
    if do is None:
        do = torch.zeros_like(outputs[0])
    gradients = _fuse_backward(
        do, dw, outputs, target, gram_scale, weights, *ctx.options, ctx.needs
    )
    small = iter(gradients[len(outputs) :])
    dy, dlogits, dgamma = (next(small) if need else None for need in ctx.needs)
    if dlogits is not None:
        dlogits = dlogits.to(ctx.logits_dtype)
    return gradients[: len(outputs)], dy, dlogits, dgamma, *(None,) * 10


_fuse.register_autograd(_differentiate, save=_save)


def _products_flops(outputs: Sequence[Tensor], method: str, vectors: int) -> int:
    """Products of each token's outputs, with ``vectors`` others and, in a problem, with each other.

    The solver's own operations, which don't depend on the width, are not counted.
    """
    scales = len(outputs)
    pairs = scales * (scales + 1) // 2 if method in ("convex", "nash") else 0
    return 2 * (pairs + vectors * scales) * outputs[0].numel()


@register_flop_formula(torch.ops.maha.fuse, get_raw=True)
def _forward_flops(outputs, target, logits, gram_scale, method, *_, out_val=None, **__) -> int:
    return _products_flops(outputs, method, 1 + (target is not None))


@register_flop_formula(torch.ops.maha.fuse_backward, get_raw=True)
def _backward_flops(
    do, dw, outputs, target, gram_scale, weights, method, *_, out_val=None, **__
) -> int:
    return _products_flops(outputs, method, 5 if method in ("convex", "nash") else 2)
