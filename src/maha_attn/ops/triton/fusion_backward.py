"""Fusion, backward."""

# A kernel's parameters have no Python types, and its language no starred expressions.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from maha_attn.ops.triton.fusion_tile import (
    addresses,
    combine,
    first_pieces,
    gram_matrix,
    load,
    load_scales,
    load_small,
    next_pieces,
    place,
    problem,
    small,
    split_tokens,
    store_small,
    sum_blocks,
    tile_weights,
    upsample,
)
from maha_attn.ops.triton.small_qp import adjoint, dot, matvec


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def backward_kernel(
    do_ptr, do_strides, dw_ptr, dw_strides, u_ptrs, u_strides, y_ptr, y_strides, gamma_ptr,
    weights_ptr, weights_strides, du_ptrs, du_strides, dy_ptr, dy_strides,
    dlogits_ptr, dlogits_strides, dgamma_ptr,
    num_tokens, num_heads, num_tiles, scale, ridge, temperature,
    METHOD: tl.constexpr, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr, FINEST: tl.constexpr,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, LOOP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients from the weights alone.

    With ``a = q̄`` (`small_qp.adjoint`) and ``A = Σ_s a_s u_s``: ``ȳ = A/√K``, ``γ̄ = -aᵀGw``, and
    ``ū_s = w_s (Ō* - γA/√K) + a_s (y - γO*)/√K``; Nash has ``2u_s`` for ``y`` and 1 for γ. A
    block's gradient is summed in registers over its tokens in the tile, one of ``PARTS`` runs of
    tokens after the other; where a block spans several tiles, each writes its share, in fp32, and
    `_fuse_backward` adds them up. Gradients read everything again, from the cache: another eviction
    policy than the first time keeps the compiler from holding it in registers.
    """
    S: tl.constexpr = len(u_ptrs)
    QP: tl.constexpr = METHOD == "convex" or METHOD == "nash"
    row, tile, first_head, head, token, real = place(
        num_tokens, num_heads, num_tiles, HEADS, TOKENS, SHIFT
    )
    pointers = small(weights_ptr, weights_strides, row, head, token, SHIFT)
    w = load_small(pointers, 1, real, S)
    tile_w = tile_weights(w, HEADS, TOKENS, PIECE)
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + head)
    if METHOD != "mean":
        gram, grad = gram_matrix(
            u_ptrs, u_strides, do_ptr, do_strides, row, first_head, tile, num_tokens, scale,
            RATIO, FINE, SHIFT, WIDTH, QP, HEADS, TOKENS, PIECE, LOOP,
        )  # fmt: skip
        if dw_ptr is not None:
            pointers = small(dw_ptr, dw_strides, row, head, token, SHIFT)
            through_output, through_weights = grad, load_small(pointers, dw_strides[3], real, S)
            grad = ()
            for s in tl.static_range(S):
                grad = grad + (through_output[s] + through_weights[s],)
        if QP:
            M = problem(gram, gamma_ptr, head, ridge)
            a = adjoint(M, w, grad, temperature, CONSTRAINT, SOFT)
            if dgamma_ptr is not None:
                value = tl.reshape(dot(a, matvec(gram, w)), HEADS, TOKENS)
                value = tl.where(tl.reshape(real, HEADS, TOKENS), value, 0.0)
                offset = (row * num_tiles + tile) * num_heads + first_head + tl.arange(0, HEADS)
                tl.store(dgamma_ptr + offset, -tl.sum(value, 1))
        else:
            mean = dot(w, grad)
            a = ()
            for s in tl.static_range(S):
                a = a + (w[s] * (grad[s] - mean),)
        if dlogits_ptr is not None:
            pointers = small(dlogits_ptr, dlogits_strides, row, head, token, SHIFT)
            store_small(pointers, dlogits_strides[3], a, real)
        tile_a = tile_weights(a, HEADS, TOKENS, PIECE)
        tile_gamma = gamma
        if gamma_ptr is not None:
            tile_gamma = tl.load(
                gamma_ptr + first_head + tl.arange(0, HEADS * PIECE)[None] // PIECE
            )
    PART: tl.constexpr = TOKENS // PARTS
    parts_w = split_tokens(tile_w, PARTS)
    if QP:
        parts_a = split_tokens(tile_a, PARTS)
    carried = None
    if QP and LOOP and PARTS == 1:
        carried = first_pieces(
            u_ptrs, u_strides, row, first_head, tile, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
    for piece in (tl.range if LOOP else tl.static_range)(0, (WIDTH + PIECE - 1) // PIECE):
        sums = ()
        for part in tl.static_range(PARTS):
            at = tile * PARTS + part
            part_w = parts_w[part]
            left = load(
                do_ptr, do_strides, row, first_head, at, piece, num_tokens,
                PART, 1, 1, SHIFT, HEADS, PIECE, WIDTH, True, None,
            )  # fmt: skip
            if QP:
                part_a = parts_a[part]
                u = load_scales(
                    u_ptrs, u_strides, row, first_head, at, piece, num_tokens,
                    RATIO, FINE, PART, SHIFT, HEADS, PIECE, WIDTH, True, carried,
                )  # fmt: skip
                if carried is not None:
                    carried = next_pieces(carried, PIECE)
                dy = combine(part_a, u, PART) * scale
                left -= tile_gamma * dy
                if dy_ptr is not None:
                    _store(
                        dy_ptr, dy_strides, dy, row, first_head, at, piece, num_tokens,
                        1, PART, SHIFT, HEADS, PIECE, WIDTH,
                    )  # fmt: skip
                right = -tile_gamma * scale * combine(part_w, u, PART)
                if FINEST:
                    right += u[0] * scale
                elif y_ptr is not None:
                    y = load(
                        y_ptr, y_strides, row, first_head, at, piece, num_tokens,
                        PART, 1, 1, SHIFT, HEADS, PIECE, WIDTH, True, None,
                    )  # fmt: skip
                    right += y * scale
            old = sums
            sums = ()
            for s in tl.static_range(S):
                du = part_w[s] * left
                if QP:
                    du += part_a[s] * right
                    if METHOD == "nash":
                        du += part_a[s] * (2 * scale) * upsample(u[s], PART)
                    if FINEST and s == 0:
                        du += dy
                blocks = _collect(
                    du_ptrs[s], du_strides[s], du, old[s] if part > 0 else None, row, first_head,
                    tile, part, piece, num_tokens,
                    1 if FINE else RATIO**s, TOKENS, PARTS, SHIFT, HEADS, PIECE, WIDTH,
                )  # fmt: skip
                sums = sums + (blocks,)


@triton.jit
def _collect(
    ptr, strides, x, open_sum, row, first_head, tile, part: tl.constexpr, piece,
    num_tokens, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum a part's ``[T, C]`` over the tokens of each block; write the blocks that end with it.

    Returns the sums, which the next part of the same block adds to.
    """
    PART: tl.constexpr = TOKENS // PARTS
    SPAN: tl.constexpr = max(min(STRIDE, TOKENS), PART)
    blocks = sum_blocks(x, max(PART // STRIDE, 1))
    if part * PART % SPAN > 0:
        blocks += open_sum
    if (part + 1) * PART % SPAN == 0:
        _store(
            ptr, strides, blocks, row, first_head, (tile * TOKENS + part * PART) // SPAN, piece,
            num_tokens, STRIDE, SPAN, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
    return blocks


@triton.jit
def _store(
    ptr, strides, blocks, row, first_head, tile, piece, num_tokens,
    STRIDE: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the sums ``[R, C]`` over the tokens of each block of a tile.

    Blocks longer than a tile: the tile's share goes to its own row of a buffer.
    """
    pointers, exists = addresses(
        ptr, strides, row, first_head, tile, piece, num_tokens,
        TOKENS, min(STRIDE, TOKENS), SHIFT, SHIFT if STRIDE <= TOKENS else 0, HEADS, PIECE, WIDTH,
    )  # fmt: skip
    tl.store(pointers, blocks.to(ptr.dtype.element_ty), mask=exists)
