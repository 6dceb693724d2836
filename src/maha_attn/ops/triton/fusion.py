"""Fusion in one pass: each scale's output is read at its own resolution, once.

Letters as in `maha_attn.ops.fusion`. Tokens are counted from ``t' = t + shift`` with shift 1 when
causal, else 0: the block of scale ``s`` that token ``t`` sees is then ``⌊t'/r^s⌋``, stored in row
``⌊t'/r^s⌋ - shift``, and a tile of ``TOKENS`` aligned tokens holds whole blocks. Upsampling is a
broadcast in registers.

Deliberate: a program is one warp with one problem a lane, so that nothing waits for a barrier and
the solver runs in registers (`small_qp`). A token's channels lie over eight lanes, heads over the
others, tokens in registers. Gram matrices and combinations take two passes over the tile, the
second from the cache: holding the tile across the solver would cost the registers that hide its
latency. Each output element has one writer and one order of summation.
"""

# A kernel's parameters have no Python types, and its language no starred expressions.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.fusion import Fused
from maha_attn.ops.triton.small_qp import (
    FAR,
    adjoint,
    certify,
    dot,
    largest,
    matvec,
    solve,
    total,
)


class _Tile(NamedTuple):
    """What a program takes: ``heads · tokens`` problems, and their channels by ``pieces`` pieces.

    Lanes exchange their sums of products once for that many pieces.
    """

    heads: int
    tokens: int
    piece: int
    pieces: int
    registers: int | None


def _tile(kernel: str, num_heads: int, width: int, scales: int, dtype: torch.dtype) -> _Tile:
    """32 problems: four heads, whose channels lie over eight lanes each, and eight tokens.

    More heads over fewer lanes mean fewer exchanges but fewer tokens, which share less of the
    coarse scales; that was slower. Bounding the registers trades a few spills for more programs at
    once; it paid in the forward kernel.
    """
    heads = math.gcd(num_heads, 4)
    lanes = 32 // heads
    piece = min(lanes * 16 // dtype.itemsize, triton.next_power_of_2(width))
    registers = 128 if kernel == "forward" and scales <= 4 else None
    return _Tile(heads, 32 // heads, piece, max(8 // lanes, 1), registers)


@triton.jit
def _upsample(x, TOKENS: tl.constexpr):
    """Repeat each token of ``[G, T, P]`` so that there are ``TOKENS``."""
    if x.shape[1] == TOKENS:
        return x
    else:
        REPEATS: tl.constexpr = TOKENS // x.shape[1]
        wide = tl.broadcast_to(x[:, :, None], x.shape[0], x.shape[1], REPEATS, x.shape[2])
        return tl.reshape(wide, x.shape[0], TOKENS, x.shape[2])


@triton.jit
def _spread(x, TOKENS: tl.constexpr):
    """One problem a lane: ``[G, T]``, which all lanes of a token hold, to ``[G · TOKENS]``.

    Written as a gather because that fixes the layout of its result: anything else would leave
    each lane to solve all the problems of its head.
    """
    HEADS: tl.constexpr = x.shape[0]
    problem = tl.arange(0, HEADS * TOKENS)
    source = problem // TOKENS * x.shape[1] + problem % TOKENS // (TOKENS // x.shape[1])
    return tl.gather(tl.reshape(x, HEADS * x.shape[1]), source, 0)


@triton.jit
def _sum_blocks(x, ROWS: tl.constexpr):
    """Sum ``[G, T, P]`` over runs of tokens so that there are ``ROWS``."""
    if x.shape[1] == ROWS:
        return x
    else:
        runs = tl.reshape(x, x.shape[0], ROWS, x.shape[1] // ROWS, x.shape[2])
        return tl.sum(runs, 2)


@triton.jit
def _addresses(
    ptr, strides, row, heads, tile, piece: tl.constexpr, num_tokens,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to, and existence of, a piece ``[G, ROWS, PIECE]`` of a tile at stride ``STRIDE``.

    ``OFFSET``: the stored row of block 0 is ``-OFFSET``. Rows of blocks before the first or without
    a token do not exist.
    """
    ROWS: tl.constexpr = max(TOKENS // STRIDE, 1)
    first = tile * TOKENS // STRIDE
    block = tl.arange(0, ROWS)[None, :, None]
    column = piece * PIECE + tl.arange(0, PIECE)[None, None, :]
    exists = (first + block) * STRIDE < num_tokens + SHIFT
    if SHIFT:
        exists = exists & (first + block >= 1)
    if (piece + 1) * PIECE > WIDTH:
        exists = exists & (column < WIDTH)
    start = ptr + row * strides[0] + (tl.cast(first, tl.int64) - OFFSET) * strides[2]
    start += heads[:, None, None].to(tl.int64) * strides[1]
    return start + (block * strides[2] + column), exists


@triton.jit
def _load(
    ptr, strides, row, heads, tile, piece: tl.constexpr, num_tokens,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, AVAILABLE: tl.constexpr, SHIFT: tl.constexpr,
    PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A piece of a scale's output, zero where it does not exist or, fine, is not available."""
    pointers, exists = _addresses(
        ptr, strides, row, heads, tile, piece, num_tokens,
        TOKENS, STRIDE, SHIFT, SHIFT, PIECE, WIDTH,
    )  # fmt: skip
    if STRIDE < AVAILABLE:
        exists = exists & (tile * TOKENS + tl.arange(0, TOKENS)[None, :, None] >= AVAILABLE * SHIFT)
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _load_scales(
    ptrs, strides, row, heads, tile, piece: tl.constexpr, num_tokens,
    RATIO: tl.constexpr, FINE: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
    PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_load` for every scale."""
    result = ()
    for s in tl.static_range(len(ptrs)):
        result = result + (
            _load(
                ptrs[s], strides[s], row, heads, tile, piece, num_tokens,
                TOKENS, 1 if FINE else RATIO**s, RATIO**s, SHIFT, PIECE, WIDTH,
            ),
        )  # fmt: skip
    return result


@triton.jit
def _combine(w, u, TOKENS: tl.constexpr):
    """``Σ_s w_s u_s`` for every token; ``w`` from `_tile_weights`."""
    result = w[0] * _upsample(u[0], TOKENS)
    for s in tl.static_range(1, len(w)):
        result += w[s] * _upsample(u[s], TOKENS)
    return result


@triton.jit
def _products(a, b):
    """``Σ_k a_k b_k`` of pieces, for every token of the finer of the two (both lists of pieces)."""
    ROWS: tl.constexpr = max(a[0].shape[1], b[0].shape[1])
    result = _upsample(a[0], ROWS) * _upsample(b[0], ROWS)
    for i in tl.static_range(1, len(a)):
        result += _upsample(a[i], ROWS) * _upsample(b[i], ROWS)
    return tl.sum(result, 2)


@triton.jit
def _pick(pieces, s: tl.constexpr):
    """Scale ``s`` of each piece."""
    result = ()
    for i in tl.static_range(len(pieces)):
        result = result + (pieces[i][s],)
    return result


@triton.jit
def _gram(
    u_ptrs, u_strides, y_ptr, y_strides, row, heads, tile, num_tokens, scale,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    GRAM: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """``G = UUᵀ/√K`` as rows (where ``GRAM``) and ``Uy`` (where ``y_ptr``), for every token."""
    S: tl.constexpr = len(u_ptrs)
    rows, b = (), ()
    for start in tl.static_range(0, (WIDTH + PIECE - 1) // PIECE, PIECES):
        u, y = (), ()
        for i in tl.static_range(PIECES):
            u = u + (
                _load_scales(
                    u_ptrs, u_strides, row, heads, tile, start + i, num_tokens,
                    RATIO, FINE, TOKENS, SHIFT, PIECE, WIDTH,
                ),
            )  # fmt: skip
            if y_ptr is not None:
                y = y + (
                    _load(
                        y_ptr, y_strides, row, heads, tile, start + i, num_tokens,
                        TOKENS, 1, 1, SHIFT, PIECE, WIDTH,
                    ),
                )  # fmt: skip
        old_rows, old_b = rows, b
        rows, b = (), ()
        for i in tl.static_range(S):
            entries = ()
            if GRAM:
                for j in tl.static_range(S):
                    if j < i:
                        entries = entries + (rows[j][i],)
                    else:
                        value = _spread(_products(_pick(u, i), _pick(u, j)) * scale, TOKENS)
                        if start > 0:
                            value += old_rows[i][j]
                        entries = entries + (value,)
            rows = rows + (entries,)
            if y_ptr is not None:
                value = _spread(_products(_pick(u, i), y), TOKENS)
                if start > 0:
                    value += old_b[i]
                b = b + (value,)
    return rows, b


@triton.jit
def _problem(gram, gamma_ptr, head, ridge):
    """``M = γG + ρI``."""
    gamma = 1.0 if gamma_ptr is None else tl.load(gamma_ptr + head)
    rows = ()
    for i in tl.static_range(len(gram)):
        entries = ()
        for j in tl.static_range(len(gram)):
            value = gram[i][j] * gamma
            if i == j:
                value += ridge
            entries = entries + (value,)
        rows = rows + (entries,)
    return rows


@triton.jit
def _place(
    num_tokens, num_heads, num_tiles, HEADS: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """``row``, ``tile`` and heads ``[G]`` of a program; head, ``t'`` and existence of its problems.

    Heads run fastest, as in memory.
    """
    groups = num_heads // HEADS
    index = tl.program_id(0)
    first_head = index % groups * HEADS
    tile = index // groups % num_tiles
    row = tl.cast(index // groups // num_tiles, tl.int64)
    problem = tl.arange(0, HEADS * TOKENS)
    head = first_head + problem // TOKENS
    token = tile * TOKENS + problem % TOKENS
    real = (token >= SHIFT) & (token < num_tokens + SHIFT)
    return row, tile, first_head + tl.arange(0, HEADS), head, token, real


@triton.jit
def _small(ptr, strides, row, head, token, SHIFT: tl.constexpr):
    """Pointers to the program's problems in a ``[B, H, N, …]`` tensor."""
    start = ptr + row * strides[0] + head.to(tl.int64) * strides[1]
    return start + (token - SHIFT).to(tl.int64) * strides[2]


@triton.jit
def _tile_weights(w, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Weights of problems, ``[G · T]``, where the tile ``[G, T, P]`` needs them."""
    result = ()
    for s in tl.static_range(len(w)):
        result = result + (tl.reshape(w[s], HEADS, TOKENS)[:, :, None],)
    return result


@triton.jit
def _softmax(logits, token, RATIO: tl.constexpr, SHIFT: tl.constexpr):
    """Softmax over the available scales."""
    S: tl.constexpr = len(logits)
    masked, e, result = (logits[0],), (), ()
    for s in tl.static_range(1, S):
        masked = masked + (tl.where(token >= SHIFT * RATIO**s, logits[s], float("-inf")),)
    top = largest(masked)
    for s in tl.static_range(S):
        e = e + (tl.exp(masked[s] - top),)
    mass = total(e)
    for s in tl.static_range(S):
        result = result + (e[s] / mass,)
    return result


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _forward_kernel(
    u_ptrs, u_strides, y_ptr, y_strides, logits_ptr, logits_strides, gamma_ptr,
    o_ptr, o_strides, weights_ptr, weights_strides, residual_ptr, status_ptr,
    num_tokens, num_heads, num_tiles, scale, ridge, sparsity, temperature,
    METHOD: tl.constexpr, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr, FINEST: tl.constexpr,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(u_ptrs)
    row, tile, heads, head, token, real = _place(
        num_tokens, num_heads, num_tiles, HEADS, TOKENS, SHIFT
    )
    logits = ()
    for s in tl.static_range(S):
        if logits_ptr is None:
            logits = logits + (head * 0.0,)
        else:
            pointers = _small(logits_ptr, logits_strides, row, head, token, SHIFT)
            value = tl.load(pointers + s * logits_strides[3], mask=real, other=0.0)
            logits = logits + (value.to(tl.float32),)
    if METHOD == "convex" or METHOD == "nash":
        gram, b = _gram(
            u_ptrs, u_strides, y_ptr, y_strides, row, heads, tile, num_tokens, scale,
            RATIO, FINE, SHIFT, WIDTH, True, TOKENS, PIECE, PIECES,
        )  # fmt: skip
        q = ()
        for s in tl.static_range(S):
            if METHOD == "nash":
                value = gram[s][s] - sparsity
            else:
                value = logits[s] - sparsity
                if FINEST:
                    value += gram[s][0]
                elif y_ptr is not None:
                    value += b[s] * scale
            if s > 0:
                value = tl.where(token >= SHIFT * RATIO**s, value, -FAR)
            q = q + (value,)
        M = _problem(gram, gamma_ptr, head, ridge)
        w = solve(M, q, temperature, CONSTRAINT, SOFT)
        if residual_ptr is not None:
            residual, status = certify(M, q, w, temperature, CONSTRAINT, SOFT)
            offset = (row * num_heads + head) * num_tokens + (token - SHIFT)
            tl.store(residual_ptr + offset, residual, mask=real)
            tl.store(status_ptr + offset, status.to(tl.int8), mask=real)
    else:
        w = _softmax(logits, token, RATIO, SHIFT)
    if weights_ptr is not None:
        pointers = _small(weights_ptr, weights_strides, row, head, token, SHIFT)
        for s in tl.static_range(S):
            tl.store(pointers + s, w[s], mask=real)
    tile_w = _tile_weights(w, HEADS, TOKENS)
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        u = _load_scales(
            u_ptrs, u_strides, row, heads, tile, piece, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, PIECE, WIDTH,
        )  # fmt: skip
        pointers, exists = _addresses(
            o_ptr, o_strides, row, heads, tile, piece, num_tokens,
            TOKENS, 1, SHIFT, SHIFT, PIECE, WIDTH,
        )  # fmt: skip
        tl.store(pointers, _combine(tile_w, u, TOKENS).to(o_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _backward_kernel(
    do_ptr, do_strides, dw_ptr, dw_strides, u_ptrs, u_strides, y_ptr, y_strides, gamma_ptr,
    weights_ptr, weights_strides, du_ptrs, du_strides, dy_ptr, dy_strides,
    dlogits_ptr, dlogits_strides, dgamma_ptr,
    num_tokens, num_heads, num_tiles, scale, ridge, temperature,
    METHOD: tl.constexpr, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr, FINEST: tl.constexpr,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Gradients from the weights alone.

    With ``a = q̄`` (`small_qp.adjoint`) and ``A = Σ_s a_s u_s``: ``ȳ = A/√K``, ``γ̄ = -aᵀGw``, and
    ``ū_s = w_s (Ō* - γA/√K) + a_s (y - γO*)/√K``; Nash has ``2u_s`` for ``y`` and 1 for γ. A
    block's gradient is summed in registers over its tokens in the tile; where a block spans several
    tiles, each writes its share, in fp32, and `_fuse_backward` adds them up.
    """
    S: tl.constexpr = len(u_ptrs)
    QP: tl.constexpr = METHOD == "convex" or METHOD == "nash"
    row, tile, heads, head, token, real = _place(
        num_tokens, num_heads, num_tiles, HEADS, TOKENS, SHIFT
    )
    w = ()
    pointers = _small(weights_ptr, weights_strides, row, head, token, SHIFT)
    for s in tl.static_range(S):
        w = w + (tl.load(pointers + s, mask=real, other=0.0),)
    tile_w = _tile_weights(w, HEADS, TOKENS)
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + head)
    if METHOD != "mean":
        gram, grad = _gram(
            u_ptrs, u_strides, do_ptr, do_strides, row, heads, tile, num_tokens, scale,
            RATIO, FINE, SHIFT, WIDTH, QP, TOKENS, PIECE, PIECES,
        )  # fmt: skip
        if dw_ptr is not None:
            pointers = _small(dw_ptr, dw_strides, row, head, token, SHIFT)
            total_grad = grad
            grad = ()
            for s in tl.static_range(S):
                extra = tl.load(pointers + s * dw_strides[3], mask=real, other=0.0)
                grad = grad + (total_grad[s] + extra,)
        if QP:
            M = _problem(gram, gamma_ptr, head, ridge)
            a = adjoint(M, w, grad, temperature, CONSTRAINT, SOFT)
            if dgamma_ptr is not None:
                value = tl.reshape(dot(a, matvec(gram, w)), HEADS, TOKENS)
                value = tl.where(tl.reshape(real, HEADS, TOKENS), value, 0.0)
                offset = (row * num_tiles + tile) * num_heads + heads
                tl.store(dgamma_ptr + offset, -tl.sum(value, 1))
        else:
            mean = dot(w, grad)
            a = ()
            for s in tl.static_range(S):
                a = a + (w[s] * (grad[s] - mean),)
        if dlogits_ptr is not None:
            pointers = _small(dlogits_ptr, dlogits_strides, row, head, token, SHIFT)
            for s in tl.static_range(S):
                tl.store(pointers + s * dlogits_strides[3], a[s], mask=real)
        tile_a = _tile_weights(a, HEADS, TOKENS)
        tile_gamma = gamma
        if gamma_ptr is not None:
            tile_gamma = tl.reshape(gamma, HEADS, TOKENS)[:, :, None]
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        left = _load(
            do_ptr, do_strides, row, heads, tile, piece, num_tokens,
            TOKENS, 1, 1, SHIFT, PIECE, WIDTH,
        )  # fmt: skip
        if QP:
            u = _load_scales(
                u_ptrs, u_strides, row, heads, tile, piece, num_tokens,
                RATIO, FINE, TOKENS, SHIFT, PIECE, WIDTH,
            )  # fmt: skip
            dy = _combine(tile_a, u, TOKENS) * scale
            left -= tile_gamma * dy
            if dy_ptr is not None:
                _store_blocks(
                    dy_ptr, dy_strides, dy, row, heads, tile, piece, num_tokens,
                    1, TOKENS, SHIFT, PIECE, WIDTH,
                )  # fmt: skip
            right = -tile_gamma * scale * _combine(tile_w, u, TOKENS)
            if FINEST:
                right += u[0] * scale
            elif y_ptr is not None:
                y = _load(
                    y_ptr, y_strides, row, heads, tile, piece, num_tokens,
                    TOKENS, 1, 1, SHIFT, PIECE, WIDTH,
                )  # fmt: skip
                right += y * scale
        for s in tl.static_range(S):
            du = tile_w[s] * left
            if QP:
                du += tile_a[s] * right
                if METHOD == "nash":
                    du += tile_a[s] * (2 * scale) * _upsample(u[s], TOKENS)
                if FINEST and s == 0:
                    du += dy
            _store_blocks(
                du_ptrs[s], du_strides[s], du, row, heads, tile, piece, num_tokens,
                1 if FINE else RATIO**s, TOKENS, SHIFT, PIECE, WIDTH,
            )  # fmt: skip


@triton.jit
def _store_blocks(
    ptr, strides, x, row, heads, tile, piece: tl.constexpr, num_tokens,
    STRIDE: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
    PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum ``[G, TOKENS, PIECE]`` over the tokens of each block and write it.

    Blocks longer than a tile: the tile's share goes to its own row of a buffer.
    """
    pointers, exists = _addresses(
        ptr, strides, row, heads, tile, piece, num_tokens,
        TOKENS, min(STRIDE, TOKENS), SHIFT, SHIFT if STRIDE <= TOKENS else 0, PIECE, WIDTH,
    )  # fmt: skip
    blocks = _sum_blocks(x, max(TOKENS // STRIDE, 1))
    tl.store(pointers, blocks.to(ptr.dtype.element_ty), mask=exists)


def fuse(
    outputs: Sequence[Tensor],
    *,
    strides: Sequence[int],
    causal: bool,
    method: str,
    fine: bool = False,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
    ridge: float = 1e-2,
    sparsity: float = 0.0,
    temperature: float = 1.0,
    constraint: str = "simplex",
    certified: bool = True,
) -> Fused:
    """`maha_attn.ops.fusion.fuse` by one kernel, differentiable once; every token has its weights.

    Any memory strides but the last, which is made 1 by a copy where it is not. ``strides`` are
    powers of a ratio that is itself a power of 2. The output lies in memory as ``[B, N, H, K]``,
    the weights as ``[B, N, H, S]``.

    Args:
        outputs, strides, causal, method, fine, logits, target, gram_scale, ridge, sparsity,
            temperature, constraint: As there. ``target=outputs[0]`` is recognised, not read twice.
        certified: Also return ``residual`` and ``status``.

    Numerics: products, problems and weights in fp32. Gradients are summed in one order.
    """
    ratio = strides[1] if len(strides) > 1 else 2
    assert tuple(strides) == tuple(ratio**s for s in range(len(outputs)))
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
        [_unit_last(u) for u in outputs],
        _unit_last(target) if target is not None and convex and not finest else None,
        logits,
        gram_scale if convex else None,
        method,
        "box" if nash else constraint,
        ratio,
        causal,
        fine,
        finest,
        ridge,
        sparsity,
        0.0 if nash else temperature,
        certified,
    )
    return Fused(output, weights, residual if certified else None, status if certified else None)


@torch.library.custom_op("maha::fuse", mutates_args=())
def _fuse(
    outputs: Sequence[Tensor], target: Tensor | None, logits: Tensor | None,
    gram_scale: Tensor | None, method: str, constraint: str, ratio: int, causal: bool, fine: bool,
    finest: bool, ridge: float, sparsity: float, temperature: float, certified: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, weights, residual and status; the last two empty unless ``certified``."""
    o, weights, residual, status = _empty_fused(outputs, certified)
    batch, heads, length, width = o.shape
    tile = _tile("forward", heads, width, len(outputs), o.dtype)
    num_tiles = triton.cdiv(length + causal, tile.tokens)
    with torch.cuda.device_of(o):
        _forward_kernel[(batch * num_tiles * (heads // tile.heads),)](
            tuple(outputs), tuple(_strides(u) for u in outputs), target, _strides(target),
            logits, _strides(logits, 4), gram_scale, o, _strides(o), weights, _strides(weights),
            residual if certified else None, status if certified else None,
            length, heads, num_tiles, width**-0.5, ridge, sparsity, temperature,
            **_constants(method, constraint, temperature, finest, ratio, fine, causal, width, tile),
        )  # fmt: skip
    return o, weights, residual, status


@torch.library.custom_op("maha::fuse_backward", mutates_args=())
def _fuse_backward(
    do: Tensor, dw: Tensor | None, outputs: Sequence[Tensor], target: Tensor | None,
    gram_scale: Tensor | None, weights: Tensor, method: str, constraint: str, ratio: int,
    causal: bool, fine: bool, finest: bool, ridge: float, temperature: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the outputs, then those that ``needs`` names of target, logits, gram_scale."""
    do = _unit_last(do)
    (batch, heads, length, width), shift = do.shape, int(causal)
    tile = _tile("backward", heads, width, len(outputs), outputs[0].dtype)
    num_tiles = triton.cdiv(length + shift, tile.tokens)
    du = [_empty_like(u) for u in outputs]
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
        _backward_kernel[(batch * num_tiles * (heads // tile.heads),)](
            do, _strides(do), dw, _strides(dw, 4),
            tuple(outputs), tuple(_strides(u) for u in outputs),
            target, _strides(target), gram_scale, weights, _strides(weights),
            tuple(written), tuple(_strides(t) for t in written), dy, _strides(dy),
            dlogits, _strides(dlogits, 4), gamma_shares,
            length, heads, num_tiles, width**-0.5, ridge, temperature,
            **_constants(method, constraint, temperature, finest, ratio, fine, causal, width, tile),
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
        "PIECES": tile.pieces,
        "num_warps": 1,
        "maxnreg": tile.registers,
    }


def _strides(t: Tensor | None, count: int = 3) -> tuple[int, ...] | None:
    return None if t is None else t.stride()[:count]


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _empty_like(t: Tensor) -> Tensor:
    """``[B, H, N, C]`` over ``[B, N, H, C]`` memory."""
    batch, heads, length, width = t.shape
    return t.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_fused(
    outputs: Sequence[Tensor], certified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u = outputs[0]
    weights = u.new_empty(*u.shape[::2], u.shape[1], len(outputs), dtype=torch.float32)
    shape = u.shape[:3] if certified else (0,)
    residual = u.new_empty(shape, dtype=torch.float32)
    return (
        _empty_like(u),
        weights.transpose(1, 2),
        residual,
        residual.new_empty(shape, dtype=torch.int8),
    )


def _small_gradients(
    do: Tensor, target: Tensor | None, weights: Tensor, gram_scale: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Room for the gradients of target, logits and gram_scale that ``needs`` names."""
    return [
        _empty_like(target) if needs[0] and target is not None else None,
        _empty_like(weights) if needs[1] else None,
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
    return [*(_empty_like(u) for u in outputs), *(t for t in small if t is not None)]


def _save(ctx, inputs, output) -> None:
    outputs, target, logits, gram_scale, *options = inputs
    _, weights, residual, status = output
    ctx.mark_non_differentiable(residual, status)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*outputs, target, gram_scale, weights)
    ctx.logits_dtype = None if logits is None else logits.dtype
    # Neither the sparsity nor whether certificates were asked for matters to the derivative.
    ctx.options = (*options[:7], options[8])


def _differentiate(ctx, do, dw, *_):
    *outputs, target, gram_scale, weights = ctx.saved_tensors
    if do is None and dw is None:
        return (None,) * 14
    if do is None:
        do = torch.zeros_like(outputs[0])
    needs = list(ctx.needs_input_grad[1:4])
    gradients = _fuse_backward(do, dw, outputs, target, gram_scale, weights, *ctx.options, needs)
    small = iter(gradients[len(outputs) :])
    dy, dlogits, dgamma = (next(small) if need else None for need in needs)
    if dlogits is not None:
        dlogits = dlogits.to(ctx.logits_dtype)
    return gradients[: len(outputs)], dy, dlogits, dgamma, *(None,) * 10


_fuse.register_autograd(_differentiate, setup_context=_save)


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
