# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Kernels for the attention of every scale: forward, and two backward passes without atomics.

Letters as in `maha_attn.ops.scale_attention`. Query ``i`` stands at key ``e_i`` and sees the keys
``e_i - back … e_i + ahead``: a window, a full span, causal or not, differ in two numbers, and
``stride`` (queries to a key) only changes where a query stands. So a tile of contiguous queries
sees one range of keys, which is cut into tiles that need a mask and tiles that need none; tiles
outside are never visited.

Rotary embedding rides along: queries are turned where they are loaded, the gradients of queries and
keys are turned back where they are stored, and only the keys, which many tiles read, are turned by
a kernel of their own (`maha_attn.ops.triton.rotary`).

Deliberate: all softmax arithmetic is fp32 in base 2; offsets from a tensor's start are 64-bit,
within a tile 32-bit; outputs and gradients are written as ``[B, N, H, K]`` memory, as the
projections read them; each output element has one writer and one order of summation, so results
repeat bit for bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.triton.rotary import turn

NARROW_KEYS = 256
"""Spans up to here have hardly an unmasked tile: one masked loop serves them best."""


class _Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps, stages of the load pipeline.

    ``registers`` caps those of a thread, where more programs at a time are worth it.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _tiles(kernel: str, narrow: bool, width: int, dtype: torch.dtype) -> _Tiles:
    """Tiles for a class of problems: the fastest measured that fit into 99 KiB of shared memory.

    Any powers of two from 16 on give correct results.
    """
    if dtype == torch.float32 and width > 128:
        return _Tiles(16, 16, 4, 2)
    if dtype == torch.float32 or width > 128:
        return _Tiles(32, 32, 4, 2)
    return _TILES[kernel, narrow, width > 64]


_TILES = {  # kernel, narrow, wider than 64
    ("forward", True, False): _Tiles(64, 64, 4, 3, 128),
    ("forward", True, True): _Tiles(64, 32, 4, 3),
    ("forward", False, False): _Tiles(64, 64, 4, 3, 128),
    ("forward", False, True): _Tiles(64, 64, 4, 2),
    ("queries", True, False): _Tiles(64, 32, 4, 3),
    ("queries", True, True): _Tiles(64, 32, 4, 2),
    ("queries", False, False): _Tiles(64, 64, 4, 3, 144),
    ("queries", False, True): _Tiles(64, 64, 4, 2),
    ("keys", True, False): _Tiles(32, 64, 4, 3, 128),
    ("keys", True, True): _Tiles(32, 64, 4, 3),
    ("keys", False, False): _Tiles(32, 64, 4, 3, 128),
    ("keys", False, True): _Tiles(32, 64, 4, 3),
}


@triton.jit
def _inside(first, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Offsets' parts and mask of a tile: rows before ``end``, columns before ``WIDTH``."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    mask = rows < end - first
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)
    return rows, columns, mask


@triton.jit
def _load(ptr, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``first … first + ROWS - 1`` of a ``[n, WIDTH]`` matrix, zero from row ``end`` on."""
    rows, columns, mask = _inside(first, end, ROWS, WIDTH, PADDED)
    start = ptr + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows * stride + columns, mask=mask, other=0.0)


@triton.jit
def _store(ptr, first, end, stride, x, WIDTH: tl.constexpr):
    """Write ``x`` to the rows from ``first`` on, none from row ``end`` on."""
    rows, columns, mask = _inside(first, end, x.shape[0], WIDTH, x.shape[1])
    start = ptr + tl.cast(first, tl.int64) * stride
    tl.store(start + rows * stride + columns, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _angles(table_ptr, first, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Cosines and sines ``[ROWS, COLUMNS]`` of a table ``[n, 2, WIDTH]`` (cos, cos, -sin, sin)."""
    HALF: tl.constexpr = WIDTH // 2
    rows, columns, mask = _inside(first, end, ROWS, WIDTH, COLUMNS)
    start = table_ptr + tl.cast(first, tl.int64) * (2 * WIDTH) + rows * (2 * WIDTH)
    angle = columns % HALF  # Half the table says it all, and is read from a cache.
    cos = tl.load(start + angle, mask=mask, other=0.0)
    sin = tl.load(start + (WIDTH + HALF) + angle, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _turn(x, ptr, stride, table_ptr, first, end, WIDTH: tl.constexpr):
    """Rotate the tile ``x``, loaded from ``ptr``: the other halves are read again, from a cache."""
    HALF: tl.constexpr = WIDTH // 2
    rows, columns, mask = _inside(first, end, x.shape[0], WIDTH, x.shape[1])
    other = tl.where(columns < HALF, columns + HALF, columns - HALF)
    start = ptr + tl.cast(first, tl.int64) * stride
    swapped = tl.load(start + rows * stride + other, mask=mask, other=0.0).to(tl.float32)
    cos, sin = _angles(table_ptr, first, end, x.shape[0], WIDTH, x.shape[1])
    sin = tl.where(columns < HALF, -sin, sin)
    return (x.to(tl.float32) * cos + swapped * sin).to(x.dtype)


@triton.jit
def _turn_back(x, table_ptr, first, end, WIDTH: tl.constexpr):
    """The adjoint rotation of a tile of fp32 sums."""
    HALF: tl.constexpr = WIDTH // 2
    left, right = tl.split(tl.permute(tl.reshape(x, x.shape[0], 2, HALF), 0, 2, 1))
    cos, sin = _angles(table_ptr, first, end, x.shape[0], WIDTH, HALF)
    turned = tl.join(left * cos + right * sin, right * cos - left * sin)
    return tl.reshape(tl.permute(turned, 0, 2, 1), x.shape[0], WIDTH)


@triton.jit
def _locate(num_heads, num_tiles, batch, NARROW: tl.constexpr):
    """``(row, head, tile)`` of a program.

    Heads run fastest: programs at work together read whole token rows of memory. A narrow span
    goes along the sequence next, since neighbours share keys. A wide one takes the same tile of
    all rows, the last tile first: when causal, that is the longest.
    """
    index = tl.program_id(0)
    head = index % num_heads
    rest = index // num_heads
    if NARROW:
        row, tile = rest // num_tiles, rest % num_tiles
    else:
        row, tile = rest % batch, num_tiles - 1 - rest // batch
    return tl.cast(row, tl.int64), tl.cast(head, tl.int64), tile


@triton.jit
def _cut(low, full_from, full_to, high, STEP: tl.constexpr):
    """``(low, start, stop, high)``: tiles of ``start … stop`` lie within ``full_*``, unmasked."""
    start = low + tl.cdiv(tl.maximum(full_from - low, 0), STEP) * STEP
    stop = start + tl.maximum(full_to - start, 0) // STEP * STEP
    some = stop > start
    return low, tl.where(some, start, low), tl.where(some, stop, low), high


@triton.jit
def _key_range(
    first, num_queries, num_keys, stride, back, ahead,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    """The keys that the queries of tile ``first …`` see, as `_cut` cuts them."""
    last = tl.minimum(first + QUERIES, num_queries) - 1
    first_key = (first + LEAD) // stride - LEAD
    last_key = (last + LEAD) // stride - LEAD
    low = tl.maximum(first_key - back, 0) // KEYS * KEYS
    high = tl.minimum(last_key + ahead + 1, num_keys)
    full_to = tl.minimum(first_key + ahead + 1, num_keys)
    return _cut(low, last_key - back, full_to, high, KEYS)


@triton.jit
def _query_range(
    first, num_queries, num_keys, stride, back, ahead,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    """The queries that see the keys of tile ``first …``, as `_cut` cuts them.

    ``e_i ≥ e`` is ``i ≥ (e + LEAD)·stride - LEAD``.
    """
    last = tl.minimum(first + KEYS, num_keys) - 1
    low = tl.maximum((first - ahead + LEAD) * stride - LEAD, 0)
    high = tl.minimum((last + back + 1 + LEAD) * stride - LEAD, num_queries)
    high = tl.where(first < num_keys, high, 0)
    full_from = (last - ahead + LEAD) * stride - LEAD
    full_to = tl.minimum((first + back + 1 + LEAD) * stride - LEAD, high)
    return _cut(low, full_from, full_to, high, QUERIES)


@triton.jit
def _part(part: tl.constexpr, cut, NARROW: tl.constexpr):
    """Begin and end of the masked, whole or masked part; a narrow span is one masked part."""
    low, start, stop, high = cut
    begin, end = low, start
    if NARROW:
        end = high
    elif part == 1:
        begin, end = start, stop
    elif part == 2:
        begin, end = stop, high
    return begin, end


@triton.jit
def _limits(queries, num_keys, stride, back, ahead, LEAD: tl.constexpr):
    """First and last key that each query sees."""
    key = (queries + LEAD) // stride - LEAD
    return key - back, tl.minimum(key + ahead, num_keys - 1)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def _forward_kernel(
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
    row, head, tile = _locate(num_heads, num_tiles, batch, NARROW)
    if lengths_ptr is not None:
        num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + row).to(tl.int32))
    q_ptr += row * q_b + head * q_h
    k_ptr += row * k_b + head * k_h
    v_ptr += row * v_b + head * v_h
    o_ptr += row * o_b + head * o_h
    lse_ptr += (row * num_heads + head) * num_queries
    first = tile * QUERIES
    queries = first + tl.arange(0, QUERIES)
    first_key, last_key = _limits(queries, num_keys, stride, back, ahead, LEAD)
    cut = _key_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    q = _load(q_ptr, first, num_queries, q_n, QUERIES, WIDTH, PADDED)
    if table_ptr is not None:
        q = _turn(q, q_ptr, q_n, table_ptr, first, num_queries, WIDTH)
        if turned_ptr is not None:
            _store(turned_ptr + row * o_b + head * o_h, first, num_queries, o_n, q, WIDTH)
    acc = tl.zeros([QUERIES, PADDED], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    # A finite start: exp2(-inf - top) is 0 also while a query has seen no key.
    top = tl.full([QUERIES], -1e30, tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = _part(part, cut, NARROW)
        for at in tl.range(begin, end, KEYS):
            k = _load(k_ptr, at, num_keys, k_n, KEYS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if part != 1:
                keys = at + tl.arange(0, KEYS)[None, :]
                seen = (keys >= first_key[:, None]) & (keys <= last_key[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(p, 1)
            v = _load(v_ptr, at, num_keys, v_n, KEYS, WIDTH, PADDED)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            top = new_top
    # A query without a key: total 0, output 0, and a finite log-sum-exp.
    total = tl.where(total > 0, total, 1.0)
    _store(o_ptr, first, num_queries, o_n, acc / total[:, None], WIDTH)
    tl.store(lse_ptr + queries, top + tl.log2(total), mask=queries < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, lengths_ptr, table_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    o_b, o_h, o_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale, softmax_scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: ``dQ = dS K``, and ``delta = Σ o·do`` for `_keys_kernel`, run next.

    ``q`` and ``k`` are rotated; with a table, the gradient is that of the queries before.
    """
    row, head, tile = _locate(num_heads, num_tiles, batch, NARROW)
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
    first_key, last_key = _limits(queries, num_keys, stride, back, ahead, LEAD)
    cut = _key_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    o = _load(o_ptr, first, num_queries, o_n, QUERIES, WIDTH, PADDED)
    do = _load(do_ptr, first, num_queries, do_n, QUERIES, WIDTH, PADDED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + queries, delta, mask=queries < num_queries)
    lse = tl.load(lse_ptr + queries, mask=queries < num_queries, other=0.0)
    q = _load(q_ptr, first, num_queries, q_n, QUERIES, WIDTH, PADDED)
    dq = tl.zeros([QUERIES, PADDED], tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = _part(part, cut, NARROW)
        for at in tl.range(begin, end, KEYS):
            k = _load(k_ptr, at, num_keys, k_n, KEYS, WIDTH, PADDED)
            v = _load(v_ptr, at, num_keys, v_n, KEYS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if part != 1:
                keys = at + tl.arange(0, KEYS)[None, :]
                seen = (keys >= first_key[:, None]) & (keys <= last_key[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if table_ptr is not None:
        dq = _turn_back(dq, table_ptr, first, num_queries, WIDTH)
    _store(dq_ptr, first, num_queries, dq_n, dq * softmax_scale, WIDTH)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def _keys_kernel(
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
    row, head, tile = _locate(num_heads, num_tiles, batch, NARROW)
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
    cut = _query_range(first, num_queries, num_keys, stride, back, ahead, QUERIES, KEYS, LEAD)
    k = _load(k_ptr, first, num_keys, k_n, KEYS, WIDTH, PADDED)
    v = _load(v_ptr, first, num_keys, v_n, KEYS, WIDTH, PADDED)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, PADDED], tl.float32)
    for part in tl.static_range(1 if NARROW else 3):
        begin, end = _part(part, cut, NARROW)
        for at in tl.range(begin, end, QUERIES):
            queries = at + tl.arange(0, QUERIES)
            q = _load(q_ptr, at, num_queries, q_n, QUERIES, WIDTH, PADDED)
            do = _load(do_ptr, at, num_queries, do_n, QUERIES, WIDTH, PADDED)
            lse = tl.load(lse_ptr + queries, mask=queries < num_queries, other=0.0)
            delta = tl.load(delta_ptr + queries, mask=queries < num_queries, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if part != 1:
                first_key, last_key = _limits(queries, num_keys, stride, back, ahead, LEAD)
                seen = (keys >= first_key[None, :]) & (keys <= last_key[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if table_ptr is not None:
        dk = _turn_back(dk, table_ptr, first, all_keys, WIDTH)
    real = keys < num_keys
    _store(dk_ptr, first, all_keys, dk_n, tl.where(real, dk * softmax_scale, 0.0), WIDTH)
    _store(dv_ptr, first, all_keys, dv_n, tl.where(real, dv, 0.0), WIDTH)


class _Scale(NamedTuple):
    """What one scale's launches need to know.

    ``back`` and ``ahead``: how many keys before and after its own key a query sees; ``stride``:
    queries to a key.
    """

    back: int
    ahead: int
    stride: int


def _span(window: int | None, num_keys: int, causal: bool) -> tuple[int, int]:
    """``back`` and ``ahead`` of a window."""
    if window is None:
        return num_keys, 0 if causal else num_keys
    back, ahead = (window - 1, 0) if causal else (window // 2, window // 2)
    return min(back, num_keys), min(ahead, num_keys)


def multiscale_attention(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    windows: Sequence[int | None],
    strides: Sequence[int],
    causal: bool,
    lengths: Sequence[Tensor] = (),
    query_tables: Sequence[Tensor] = (),
    key_table: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`maha_attn.ops.multiscale_attention.multiscale_attention` by kernels, differentiable once.

    Any strides but the last, which is made 1 by a copy where it is not. The outputs lie in memory
    as ``[B, N, H, K]``. A query without a visible key gives zeros (also in a row of length 0).

    Numerics: rotations in fp32, rounded to the inputs' dtype; bf16 and fp16 products summed in
    fp32, probabilities rounded to the inputs' dtype; fp32 products as three tf32 products each
    (errors near 1e-6).
    """
    spans = [_span(w, k.shape[2], causal) for w, k in zip(windows, ks, strict=True)]
    results = _attend(
        [_unit_last(t) for t in qs],
        [_unit_last(t) for t in ks],
        [_unit_last(t) for t in vs],
        list(query_tables),
        key_table,
        list(lengths),
        [back for back, _ in spans],
        [ahead for _, ahead in spans],
        list(strides),
        causal,
    )
    scales = len(qs)
    return results[:scales], results[3 * scales :] or list(ks)


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    stride: int = 1,
    lengths: Tensor | None = None,
) -> Tensor:
    """`maha_attn.ops.scale_attention.scale_attention`: `multiscale_attention` of one scale."""
    given = () if lengths is None else (lengths,)
    outputs, _ = multiscale_attention(
        [q], [k], [v], windows=[window], strides=[stride], causal=causal, lengths=given
    )
    return outputs[0]


@torch.library.custom_op("maha::multiscale_attention", mutates_args=())
def _attend(
    qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor],
    query_tables: Sequence[Tensor], key_table: Tensor | None, lengths: Sequence[Tensor],
    backs: Sequence[int], aheads: Sequence[int], strides: Sequence[int], causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Of every scale, the outputs; then base-2 log-sum-exps; with tables, rotated queries and keys.

    ``lengths``: none, or ``[B]`` of every scale.
    """
    outputs, lses, turned_q, turned_k = _empty_results(qs, ks, query_tables)
    for s, scale in enumerate(map(_Scale, backs, aheads, strides)):
        q, k = qs[s], ks[s]
        if key_table is not None:
            turn(k, key_table, turned_k[s], 1.0)
            k = turned_k[s]
        (batch, heads, length, width), num_keys = q.shape, k.shape[2]
        cut = _tiles("forward", _is_narrow(scale), width, q.dtype)
        num_tiles = triton.cdiv(length, cut.queries)
        with torch.cuda.device_of(q):
            _forward_kernel[(num_tiles * heads * batch,)](
                q, k, vs[s], outputs[s], lses[s], lengths[s] if lengths else None,
                query_tables[s] if query_tables else None, turned_q[s] if turned_q else None,
                *q.stride()[:3], *k.stride()[:3], *vs[s].stride()[:3], *outputs[s].stride()[:3],
                length, num_keys, heads, num_tiles, batch, scale.stride, scale.back, scale.ahead,
                math.log2(math.e) / math.sqrt(width), **_constants(q, causal, scale, cut),
            )  # fmt: skip
    return [*outputs, *lses, *turned_q, *turned_k]


@torch.library.custom_op("maha::multiscale_attention_backward", mutates_args=())
def _attend_backward(
    dos: Sequence[Tensor | None], qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor],
    outputs: Sequence[Tensor], lses: Sequence[Tensor],
    query_tables: Sequence[Tensor], key_table: Tensor | None, lengths: Sequence[Tensor],
    backs: Sequence[int], aheads: Sequence[int], strides: Sequence[int], causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of all queries, then keys, then values; ``qs`` and ``ks`` are the rotated ones."""
    gradients = _empty_gradients(qs, ks, vs)
    for s, scale in enumerate(map(_Scale, backs, aheads, strides)):
        q, k, v, do = qs[s], ks[s], vs[s], dos[s]
        dq, dk, dv = gradients[s :: len(qs)]
        if do is None:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            continue
        do = _unit_last(do)
        table = query_tables[s] if query_tables else None
        _launch_backward(
            q, k, v, outputs[s], do, lses[s], lengths[s] if lengths else None, dq, dk, dv,
            table, key_table, scale, causal,
        )  # fmt: skip
    return gradients


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, lengths: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, query_table: Tensor | None, key_table: Tensor | None,
    scale: _Scale, causal: bool,
) -> None:  # fmt: skip
    """Both backward passes of one scale."""
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    delta = torch.empty_like(lse)
    softmax_scale = 1 / math.sqrt(width)
    # A tile's halves can be split in registers where the width is a power of 2.
    inside = width == triton.next_power_of_2(width) and width >= 16
    numbers = (scale.stride, scale.back, scale.ahead, math.log2(math.e) * softmax_scale)
    with torch.cuda.device_of(q):
        cut = _tiles("queries", _is_narrow(scale), width, q.dtype)
        num_tiles = triton.cdiv(length, cut.queries)
        _queries_kernel[(num_tiles * heads * batch,)](
            q, k, v, o, do, dq, lse, delta, lengths, query_table if inside else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
            length, num_keys, heads, num_tiles, batch, *numbers, softmax_scale,
            **_constants(q, causal, scale, cut),
        )  # fmt: skip
        cut = _tiles("keys", _is_narrow(scale), width, q.dtype)
        num_tiles = triton.cdiv(num_keys, cut.keys)
        if num_keys:
            _keys_kernel[(num_tiles * heads * batch,)](
                q, k, v, do, dk, dv, lse, delta, lengths, key_table if inside else None,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                length, num_keys, heads, num_tiles, batch, *numbers, softmax_scale,
                **_constants(q, causal, scale, cut),
            )  # fmt: skip
    if not inside:
        for gradient, table in ((dq, query_table), (dk, key_table)):
            if table is not None:
                turn(gradient, table, gradient, -1.0)


def _is_narrow(scale: _Scale) -> bool:
    return scale.back + scale.ahead < NARROW_KEYS


def _constants(q: Tensor, causal: bool, scale: _Scale, cut: _Tiles) -> dict[str, object]:
    """What a kernel is compiled for, the same for all three."""
    return {
        "LEAD": int(causal),
        "NARROW": _is_narrow(scale),
        "QUERIES": cut.queries,
        "KEYS": cut.keys,
        "WIDTH": q.shape[-1],
        "PADDED": max(triton.next_power_of_2(q.shape[-1]), 16),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": cut.warps,
        "num_stages": cut.stages,
        "maxnreg": cut.registers,
    }


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _empty_like(t: Tensor) -> Tensor:
    """``[B, H, N, K]`` over ``[B, N, H, K]`` memory."""
    batch, heads, length, width = t.shape
    return t.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_results(
    qs: Sequence[Tensor], ks: Sequence[Tensor], query_tables: Sequence[Tensor]
) -> tuple[list[Tensor], ...]:
    """Outputs, log-sum-exps, and, with tables, rotated queries and keys."""
    lses = [q.new_empty(q.shape[:3], dtype=torch.float32) for q in qs]
    turned = ([_empty_like(t) for t in ts] if query_tables else [] for ts in (qs, ks))
    return [_empty_like(q) for q in qs], lses, *turned


def _empty_gradients(
    qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor]
) -> list[Tensor]:
    return [_empty_like(t) for t in (*qs, *ks, *vs)]


@_attend.register_fake
def _(qs, ks, vs, query_tables, key_table, lengths, backs, aheads, strides, causal):
    return [t for results in _empty_results(qs, ks, query_tables) for t in results]


@_attend_backward.register_fake
def _(
    dos, qs, ks, vs, outputs, lses, query_tables, key_table, lengths, backs, aheads, strides, causal
):
    return _empty_gradients(qs, ks, vs)


def _save(ctx, inputs, output) -> None:
    qs, ks, vs, query_tables, key_table, lengths, *ctx.options = inputs
    scales = ctx.scales = len(qs)
    ctx.mark_non_differentiable(*output[scales:])
    ctx.set_materialize_grads(False)
    if query_tables:
        qs, ks = output[2 * scales : 3 * scales], output[3 * scales :]
    ctx.save_for_backward(*qs, *ks, *vs, *output[: 2 * scales], key_table, *query_tables, *lengths)
    ctx.tables = len(query_tables)


def _differentiate(ctx, grads):
    saved, scales = ctx.saved_tensors, ctx.scales
    qs, ks, vs, outputs, lses = (saved[i * scales : (i + 1) * scales] for i in range(5))
    key_table, *rest = saved[5 * scales :]
    gradients = _attend_backward(
        grads[:scales], qs, ks, vs, outputs, lses,
        rest[: ctx.tables], key_table, rest[ctx.tables :], *ctx.options,
    )  # fmt: skip
    dqs, dks, dvs = (gradients[i * scales : (i + 1) * scales] for i in range(3))
    return dqs, dks, dvs, [None] * ctx.tables, None, [None] * len(rest[ctx.tables :]), *(None,) * 4


_attend.register_autograd(_differentiate, setup_context=_save)


def executed_pairs(kernel: str, q: Tensor, k: Tensor, scale: _Scale, causal: bool) -> int:
    """Query-key pairs of all tiles that a kernel visits (``lengths`` not regarded)."""
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    back, ahead, stride = scale
    cut = _tiles(kernel, _is_narrow(scale), width, q.dtype)
    lead = int(causal)
    pairs = 0
    if kernel == "keys":
        for first in range(0, num_keys, cut.keys):
            last = min(first + cut.keys, num_keys) - 1
            low = max((first - ahead + lead) * stride - lead, 0)
            high = min((last + back + 1 + lead) * stride - lead, length)
            pairs += cut.keys * max(-(-(high - low) // cut.queries), 0) * cut.queries
    else:
        for first in range(0, length, cut.queries):
            last = min(first + cut.queries, length) - 1
            low = max((first + lead) // stride - lead - back, 0) // cut.keys * cut.keys
            high = min((last + lead) // stride - lead + ahead + 1, num_keys)
            pairs += cut.queries * max(-(-(high - low) // cut.keys), 0) * cut.keys
    return batch * heads * pairs


def _pairs(kernel: str, qs, ks, backs, aheads, strides, causal) -> int:
    """`executed_pairs` of all scales."""
    scales = map(_Scale, backs, aheads, strides)
    return sum(
        executed_pairs(kernel, q, k, scale, causal)
        for q, k, scale in zip(qs, ks, scales, strict=True)
    )


@register_flop_formula(torch.ops.maha.multiscale_attention, get_raw=True)
def _forward_flops(qs, ks, vs, query_tables, key_table, lengths, *options, out_val=None, **_):
    return 4 * qs[0].shape[-1] * _pairs("forward", qs, ks, *options)


@register_flop_formula(torch.ops.maha.multiscale_attention_backward, get_raw=True)
def _backward_flops(
    dos, qs, ks, vs, outputs, lses, query_tables, key_table, lengths, *options, out_val=None, **_
):
    """Three products a pair for the queries, four for the keys: two are computed twice."""
    queries, keys = (_pairs(kernel, qs, ks, *options) for kernel in ("queries", "keys"))
    return qs[0].shape[-1] * (6 * queries + 8 * keys)
