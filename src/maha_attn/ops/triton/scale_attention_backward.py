"""Attention of one scale, backward: two passes, so that each gradient has one writer."""

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
    query_range,
    store,
    turn_back,
)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, lengths_ptr, table_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    o_b, o_h, o_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale, softmax_scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: ``dQ = dS K``, and ``delta = Σ o·do`` for `keys_kernel`, run next.

    ``q`` and ``k`` are rotated; with a table, the gradient is that of the queries before.
    """
    row, head, tile = locate(num_heads, num_tiles, batch, NARROW)
    if lengths_ptr is not None:
        num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + row).to(tl.int32))
    q_ptr += row * q_b + head * q_h
    k_ptr += row * k_b + head * k_h
    v_ptr += row * v_b + head * v_h
    o_ptr += row * o_b + head * o_h
    do_ptr += row * do_b + head * do_h
    dq_ptr += row * dq_b + head * dq_h
    lse_ptr += (row * num_heads + head) * num_queries
    delta_ptr += (row * num_heads + head) * num_queries
    first = tile * QUERIES
    queries = first + tl.arange(0, QUERIES)
    first_key, last_key = limits(queries, num_keys, stride, back, ahead, LEAD)
    cut = key_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    o = load(o_ptr, first, num_queries, o_n, QUERIES, WIDTH, PADDED)
    do = load(do_ptr, first, num_queries, do_n, QUERIES, WIDTH, PADDED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + queries, delta, mask=queries < num_queries)
    lse = tl.load(lse_ptr + queries, mask=queries < num_queries, other=0.0)
    q = load(q_ptr, first, num_queries, q_n, QUERIES, WIDTH, PADDED)
    dq = tl.zeros([QUERIES, PADDED], tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = bounds(part, cut, NARROW)
        for at in tl.range(begin, end, KEYS):
            k = load(k_ptr, at, num_keys, k_n, KEYS, WIDTH, PADDED)
            v = load(v_ptr, at, num_keys, v_n, KEYS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if part != 1:
                keys = at + tl.arange(0, KEYS)[None, :]
                seen = (keys >= first_key[:, None]) & (keys <= last_key[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if table_ptr is not None:
        dq = turn_back(dq, table_ptr, first, num_queries, WIDTH)
    store(dq_ptr, first, num_queries, dq_n, dq * softmax_scale, WIDTH)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, lengths_ptr, table_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale, softmax_scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: ``dV = Pᵀ dO`` and ``dK = dSᵀ Q``.

    Unmasked tiles may reach beyond the last query, where ``q``, ``do``, ``lse`` and ``delta`` are
    loaded as 0 and add nothing, and beyond the last key, whose rows are set to 0 at the end.
    """
    row, head, tile = locate(num_heads, num_tiles, batch, NARROW)
    if not NARROW:
        tile = num_tiles - 1 - tile  # When causal, the first keys have the most queries.
    all_keys = num_keys
    if lengths_ptr is not None:
        num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + row).to(tl.int32))
    q_ptr += row * q_b + head * q_h
    k_ptr += row * k_b + head * k_h
    v_ptr += row * v_b + head * v_h
    do_ptr += row * do_b + head * do_h
    dk_ptr += row * dk_b + head * dk_h
    dv_ptr += row * dv_b + head * dv_h
    lse_ptr += (row * num_heads + head) * num_queries
    delta_ptr += (row * num_heads + head) * num_queries
    first = tile * KEYS
    keys = first + tl.arange(0, KEYS)[:, None]
    cut = query_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    k = load(k_ptr, first, num_keys, k_n, KEYS, WIDTH, PADDED)
    v = load(v_ptr, first, num_keys, v_n, KEYS, WIDTH, PADDED)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, PADDED], tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = bounds(part, cut, NARROW)
        for at in tl.range(begin, end, QUERIES):
            queries = at + tl.arange(0, QUERIES)
            q = load(q_ptr, at, num_queries, q_n, QUERIES, WIDTH, PADDED)
            do = load(do_ptr, at, num_queries, do_n, QUERIES, WIDTH, PADDED)
            lse = tl.load(lse_ptr + queries, mask=queries < num_queries, other=0.0)
            delta = tl.load(delta_ptr + queries, mask=queries < num_queries, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if part != 1:
                first_key, last_key = limits(queries, num_keys, stride, back, ahead, LEAD)
                seen = (keys >= first_key[None, :]) & (keys <= last_key[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if table_ptr is not None:
        dk = turn_back(dk, table_ptr, first, all_keys, WIDTH)
    real = keys < num_keys
    store(dk_ptr, first, all_keys, dk_n, tl.where(real, dk * softmax_scale, 0.0), WIDTH)
    store(dv_ptr, first, all_keys, dv_n, tl.where(real, dv, 0.0), WIDTH)
