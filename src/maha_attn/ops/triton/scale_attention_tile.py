"""Device functions of the attention kernels: which keys a tile of queries sees; rows; rotations.

Letters as in `maha_attn.ops.scale_attention`. Query ``i`` stands at key ``e_i`` and sees the keys
``e_i - back … e_i + ahead``: a window, a full span, causal or not, differ in two numbers, and
``stride`` (queries to a key) only changes where a query stands. So a tile of contiguous queries
sees one range of keys, which is cut into tiles that need a mask and tiles that need none; tiles
outside are never visited.

Deliberate: offsets from a tensor's start are 64-bit, within a tile 32-bit.
"""

# A kernel's parameters have no Python types.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


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
def load(ptr, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``first … first + ROWS - 1`` of a ``[n, WIDTH]`` matrix, zero from row ``end`` on."""
    rows, columns, mask = _inside(first, end, ROWS, WIDTH, PADDED)
    start = ptr + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows * stride + columns, mask=mask, other=0.0)


@triton.jit
def store(ptr, first, end, stride, x, WIDTH: tl.constexpr):
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
def turn(x, ptr, stride, table_ptr, first, end, WIDTH: tl.constexpr):
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
def turn_back(x, table_ptr, first, end, WIDTH: tl.constexpr):
    """The adjoint rotation of a tile of fp32 sums."""
    HALF: tl.constexpr = WIDTH // 2
    left, right = tl.split(tl.permute(tl.reshape(x, x.shape[0], 2, HALF), 0, 2, 1))
    cos, sin = _angles(table_ptr, first, end, x.shape[0], WIDTH, HALF)
    turned = tl.join(left * cos + right * sin, right * cos - left * sin)
    return tl.reshape(tl.permute(turned, 0, 2, 1), x.shape[0], WIDTH)


@triton.jit
def locate(num_heads, num_tiles, batch, NARROW: tl.constexpr):
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
def key_range(
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
def query_range(
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
def bounds(part: tl.constexpr, cut, NARROW: tl.constexpr):
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
def limits(queries, num_keys, stride, back, ahead, LEAD: tl.constexpr):
    """First and last key that each query sees."""
    key = (queries + LEAD) // stride - LEAD
    return key - back, tl.minimum(key + ahead, num_keys - 1)
