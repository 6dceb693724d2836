"""Attention of one scale, forward."""

# A kernel's parameters have no Python types.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from maha_attn.ops.triton.scale_attention_tile import (
    bounds,
    key_range,
    limits,
    load,
    locate,
    store,
    turn,
)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr, table_ptr, turned_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: its outputs by online softmax, and its base-2 log-sum-exp.

    With a rotary table, the rotated queries are used, and kept in ``turned_ptr`` (laid out as the
    outputs) where that is given.
    """
    row, head, tile = locate(num_heads, num_tiles, batch, NARROW)
    if lengths_ptr is not None:
        num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + row).to(tl.int32))
    q_ptr += row * q_b + head * q_h
    k_ptr += row * k_b + head * k_h
    v_ptr += row * v_b + head * v_h
    o_ptr += row * o_b + head * o_h
    lse_ptr += (row * num_heads + head) * num_queries
    first = tile * QUERIES
    queries = first + tl.arange(0, QUERIES)
    first_key, last_key = limits(queries, num_keys, stride, back, ahead, LEAD)
    cut = key_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    q = load(q_ptr, first, num_queries, q_n, QUERIES, WIDTH, PADDED)
    if table_ptr is not None:
        q = turn(q, q_ptr, q_n, table_ptr, first, num_queries, WIDTH)
        if turned_ptr is not None:
            store(turned_ptr + row * o_b + head * o_h, first, num_queries, o_n, q, WIDTH)
    acc = tl.zeros([QUERIES, PADDED], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    # A finite start: exp2(-inf - top) is 0 also while a query has seen no key.
    top = tl.full([QUERIES], -1e30, tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = bounds(part, cut, NARROW)
        for at in tl.range(begin, end, KEYS):
            k = load(k_ptr, at, num_keys, k_n, KEYS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if part != 1:
                keys = at + tl.arange(0, KEYS)[None, :]
                seen = (keys >= first_key[:, None]) & (keys <= last_key[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(p, 1)
            v = load(v_ptr, at, num_keys, v_n, KEYS, WIDTH, PADDED)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            top = new_top
    # A query without a key: total 0, output 0, and a finite log-sum-exp.
    total = tl.where(total > 0, total, 1.0)
    store(o_ptr, first, num_queries, o_n, acc / total[:, None], WIDTH)
    tl.store(lse_ptr + queries, top + tl.log2(total), mask=queries < num_queries)
