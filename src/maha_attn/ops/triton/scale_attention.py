# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Kernels for the attention of one scale: forward, and two backward passes without atomics.

Letters as in `maha_attn.ops.scale_attention`. Query ``i`` stands at key ``e_i`` and sees the keys
``e_i - back … e_i + ahead``: a window, a full span, causal or not, differ in two numbers, and
``stride`` (queries to a key) only changes where a query stands. So a tile of contiguous queries
sees one range of keys, which is cut into tiles that need a mask and tiles that need none; tiles
outside are never visited.

Deliberate: all softmax arithmetic is fp32 in base 2; offsets from a tensor's start are 64-bit,
within a tile 32-bit; outputs and gradients are written as ``[B, N, H, K]`` memory, as the
projections read them; each output element has one writer and one order of summation, so results
repeat bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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
    ("forward", True, False): _Tiles(64, 64, 4, 3),
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
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: its outputs by online softmax, and its base-2 log-sum-exp."""
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
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, lengths_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    o_b, o_h, o_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    num_queries, num_keys, num_heads, num_tiles, batch, stride, back, ahead, scale, softmax_scale,
    LEAD: tl.constexpr, NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: ``dQ = dS K``, and ``delta = Σ o·do`` for `_keys_kernel`, run next."""
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
    _store(dq_ptr, first, num_queries, dq_n, dq * softmax_scale, WIDTH)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "batch", "back", "ahead"])
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, lengths_ptr,
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
    real = keys < num_keys
    _store(dk_ptr, first, all_keys, dk_n, tl.where(real, dk * softmax_scale, 0.0), WIDTH)
    _store(dv_ptr, first, all_keys, dv_n, tl.where(real, dv, 0.0), WIDTH)


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
    """`maha_attn.ops.scale_attention.scale_attention` by kernels, differentiable once.

    Any strides but the last, which is made 1 by a copy where it is not. The output lies in memory
    as ``[B, N, H, K]``. A query without a visible key gives zeros (also in a row of length 0).

    Numerics: bf16 and fp16 products summed in fp32, probabilities rounded to the inputs' dtype;
    fp32 products as three tf32 products each (errors near 1e-6).
    """
    num_keys = k.shape[2]
    if window is None:
        back, ahead = num_keys, 0 if causal else num_keys
    else:
        back, ahead = (window - 1, 0) if causal else (window // 2, window // 2)
        back, ahead = min(back, num_keys), min(ahead, num_keys)
    return _attention(q, k, v, lengths, back, ahead, causal, stride)[0]


@torch.library.custom_op("maha::scale_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
    back: int, ahead: int, causal: bool, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[B, H, N, K]`` and base-2 log-sum-exp ``[B, H, N]``."""
    q, k, v = (_unit_last(t) for t in (q, k, v))
    o, lse = _empty_outputs(q)
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    narrow = back + ahead < NARROW_KEYS
    scale = math.log2(math.e) / math.sqrt(width)
    cut = _tiles("forward", narrow, width, q.dtype)
    num_tiles = triton.cdiv(length, cut.queries)
    with torch.cuda.device_of(q):
        _forward_kernel[(num_tiles * heads * batch,)](
            q, k, v, o, lse, lengths,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
            length, num_keys, heads, num_tiles, batch, stride, back, ahead, scale,
            **_constants(q, causal, narrow, cut),
        )  # fmt: skip
    return o, lse


@torch.library.custom_op("maha::scale_attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    lengths: Tensor | None, back: int, ahead: int, causal: bool, stride: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `_attention`'s inputs."""
    do, q, k, v = (_unit_last(t) for t in (do, q, k, v))
    dq, dk, dv = (_empty_like(t) for t in (q, k, v))
    delta = torch.empty_like(lse)
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    narrow = back + ahead < NARROW_KEYS
    softmax_scale = 1 / math.sqrt(width)
    scale = math.log2(math.e) * softmax_scale
    with torch.cuda.device_of(q):
        cut = _tiles("queries", narrow, width, q.dtype)
        num_tiles = triton.cdiv(length, cut.queries)
        _queries_kernel[(num_tiles * heads * batch,)](
            q, k, v, o, do, dq, lse, delta, lengths,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
            length, num_keys, heads, num_tiles, batch, stride, back, ahead, scale, softmax_scale,
            **_constants(q, causal, narrow, cut),
        )  # fmt: skip
        cut = _tiles("keys", narrow, width, q.dtype)
        num_tiles = triton.cdiv(num_keys, cut.keys)
        if num_keys:
            _keys_kernel[(num_tiles * heads * batch,)](
                q, k, v, do, dk, dv, lse, delta, lengths,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                length, num_keys, heads, num_tiles, batch, stride, back, ahead,
                scale, softmax_scale, **_constants(q, causal, narrow, cut),
            )  # fmt: skip
    return dq, dk, dv


def _constants(q: Tensor, causal: bool, narrow: bool, cut: _Tiles) -> dict[str, object]:
    """What a kernel is compiled for, the same for all three."""
    return {
        "LEAD": int(causal),
        "NARROW": narrow,
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


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention.register_fake
def _(q, k, v, lengths, back, ahead, causal, stride):
    return _empty_outputs(q)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, lengths, back, ahead, causal, stride):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, lengths, *ctx.options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, lengths)


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 8
    *tensors, lengths = ctx.saved_tensors
    return *_attention_backward(do, *tensors, lengths, *ctx.options), *(None,) * 5


_attention.register_autograd(_differentiate, setup_context=_save)


def executed_pairs(
    kernel: str, q: Tensor, k: Tensor, back: int, ahead: int, causal: bool, stride: int
) -> int:
    """Query-key pairs of all tiles that a kernel visits (``lengths`` not regarded)."""
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    cut = _tiles(kernel, back + ahead < NARROW_KEYS, width, q.dtype)
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


@register_flop_formula(torch.ops.maha.scale_attention, get_raw=True)
def _forward_flops(q, k, v, lengths, *options, out_val=None, **_) -> int:
    return 4 * q.shape[-1] * executed_pairs("forward", q, k, *options)


@register_flop_formula(torch.ops.maha.scale_attention_backward, get_raw=True)
def _backward_flops(do, q, k, v, o, lse, lengths, *options, out_val=None, **_) -> int:
    """Three products a pair for the queries, four for the keys: two are computed twice."""
    width = q.shape[-1]
    queries, keys = (executed_pairs(kernel, q, k, *options) for kernel in ("queries", "keys"))
    return width * (6 * queries + 8 * keys)
