"""Fusion, forward."""

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
    load_scales,
    load_small,
    next_pieces,
    place,
    problem,
    small,
    store_small,
    tile_weights,
)
from maha_attn.ops.triton.small_qp import FAR, certify, largest, solve, total


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
def forward_kernel(
    u_ptrs, u_strides, y_ptr, y_strides, logits_ptr, logits_strides, gamma_ptr,
    o_ptr, o_strides, weights_ptr, weights_strides, residual_ptr, status_ptr,
    num_tokens, num_heads, num_tiles, scale, ridge, sparsity, temperature,
    METHOD: tl.constexpr, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr, FINEST: tl.constexpr,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Gram matrix, problem, weights, output: the outputs of the scales are read twice.

    The second reading comes from the caches: holding a tile across the solver would cost the
    registers that hide its latency.
    """
    S: tl.constexpr = len(u_ptrs)
    row, tile, first_head, head, token, real = place(
        num_tokens, num_heads, num_tiles, HEADS, TOKENS, SHIFT
    )
    if logits_ptr is None:
        logits = ()
        for _ in tl.static_range(S):
            logits = logits + (head * 0.0,)
    else:
        pointers = small(logits_ptr, logits_strides, row, head, token, SHIFT)
        logits = load_small(pointers, logits_strides[3], real, S)
    if METHOD == "convex" or METHOD == "nash":
        gram, b = gram_matrix(
            u_ptrs, u_strides, y_ptr, y_strides, row, first_head, tile, num_tokens, scale,
            RATIO, FINE, SHIFT, WIDTH, True, HEADS, TOKENS, PIECE, LOOP,
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
        M = problem(gram, gamma_ptr, head, ridge)
        w = solve(M, q, temperature, CONSTRAINT, SOFT)
        if residual_ptr is not None:
            residual, status = certify(M, q, w, temperature, CONSTRAINT, SOFT)
            offset = (row * num_heads + head) * num_tokens + (token - SHIFT)
            tl.store(residual_ptr + offset, residual, mask=real)
            tl.store(status_ptr + offset, status.to(tl.int8), mask=real)
    else:
        w = _softmax(logits, token, RATIO, SHIFT)
    if weights_ptr is not None:
        pointers = small(weights_ptr, weights_strides, row, head, token, SHIFT)
        store_small(pointers, 1, w, real)
    tile_w = tile_weights(w, HEADS, TOKENS, PIECE)
    at = None
    if LOOP:
        at = first_pieces(
            u_ptrs, u_strides, row, first_head, tile, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH,
        ) + first_pieces(
            (o_ptr,), (o_strides,), row, first_head, tile, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
    for piece in (tl.range if LOOP else tl.static_range)(0, (WIDTH + PIECE - 1) // PIECE):
        u = load_scales(
            u_ptrs, u_strides, row, first_head, tile, piece, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH, False, at,
        )  # fmt: skip
        to, exists = addresses(
            o_ptr, o_strides, row, first_head, tile, piece, num_tokens,
            TOKENS, 1, SHIFT, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
        if LOOP:
            to = at[S]
            at = next_pieces(at, PIECE)
        tl.store(to, combine(tile_w, u, TOKENS).to(o_ptr.dtype.element_ty), mask=exists)
