# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Triton compiles the kernels below; their Python types say nothing.)
"""Kernels of a decoding step up to attention: projections, pyramid, rotated keys and queries.

Letters as in `maha_attn.layers.cache.CacheState`: ``B`` rows, ``D`` channels, ``S`` scales, ``k``
taps. A row of ``end`` tokens, the new one included, has ``⌊end/r^s⌋`` blocks of scale ``s``, and
completes one at this step where ``end mod r^s = 0``. All arithmetic is fp32 (products of low
precision inputs summed in fp32), rounded where a tensor is written.

A step has few rows, so every product is bound by reading its weights: a program takes few columns
and all rows, and the projections of all scales are one launch.
"""

import triton
import triton.language as tl


@triton.jit
def pick(values, index):
    """``values[index]`` of a tuple, for an index that only the device knows."""
    result = values[0]
    for i in tl.static_range(1, len(values)):
        if index == i:
            result = values[i]
    return result


@triton.jit
def stride_of(s, RATIO: tl.constexpr, SCALES: tl.constexpr):
    """``r^s``."""
    result = 1
    for i in tl.static_range(1, SCALES):
        result = tl.where(s >= i, result * RATIO, result)
    return result


@triton.jit
def load_progress(lengths_ptr, active_ptr, row, mask):
    """Tokens of each row, the new one included, and whether it has a new one."""
    end = tl.load(lengths_ptr + row, mask=mask, other=0).to(tl.int32)
    live = mask
    if active_ptr is not None:
        live = live & (tl.load(active_ptr + row, mask=mask, other=0) != 0)
    return end, live


@triton.jit
def _load_rows(ptr, rows, stride, inner, num_rows, depth):
    mask = (rows < num_rows)[:, None] & (inner < depth)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + inner[None, :], mask=mask, other=0.0)


@triton.jit
def _load_bias(ptr, columns, width):
    return tl.load(ptr + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch"])
def linear_kernel(
    x_ptr, weights, biases, outs, widths, lengths_ptr, active_ptr, batch, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x Wᵀ + b`` for several ``W`` ``[widths[i], D]``; and the rows' lengths grow by one.

    They grow here because no other program of this launch reads them.
    """
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tile == 0:
        end, live = load_progress(lengths_ptr, active_ptr, rows, rows < batch)
        tl.store(lengths_ptr + rows, (end + 1).to(tl.int64), mask=live)
    for i in tl.static_range(len(weights)):
        num_tiles = tl.cdiv(widths[i], COLUMNS)
        if (tile >= 0) & (tile < num_tiles):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            for at in range(0, depth, DEPTH):
                inner = at + tl.arange(0, DEPTH)
                x = _load_rows(x_ptr, rows, depth, inner, batch, depth)
                w = _load_rows(weights[i], columns, depth, inner, widths[i], depth)
                acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            if biases[i] is not None:
                acc += _load_bias(biases[i], columns, widths[i])[None, :]
            out = outs[i] + rows.to(tl.int64)[:, None] * widths[i] + columns[None, :]
            mask = (rows < batch)[:, None] & (columns < widths[i])[None, :]
            tl.store(out, acc.to(outs[i].dtype.element_ty), mask=mask)
        tile -= num_tiles


@triton.jit(do_not_specialize=["num_slots"])
def pyramid_kernel(
    x_ptr, v_ptr, taps_ptr, values_ptr, scales_ptr, down, lengths_ptr, active_ptr,
    offsets, sizes, depth, num_heads, num_slots,
    RATIO: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The new tokens of all scales of ``X`` or ``V``, some channels of one row.

    Writes the rings of taps, the rings of values, and ``scales`` ``[B, S, D]``: the new ``X_s``, or
    zeros where no block is complete.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_values = tl.program_id(1)
    row = tl.cast(tl.program_id(2), tl.int64)
    end, live = load_progress(lengths_ptr, active_ptr, row, row >= 0)
    exists = channels < depth
    source = x_ptr
    if of_values:
        source = v_ptr
    token = tl.load(source + row * depth + channels, mask=exists, other=0.0)
    taps_ptr += (row * 2 + of_values) * SCALES * TAPS * depth + channels
    head = channels // WIDTH
    values_ptr += (row * num_heads + head) * num_slots * WIDTH + channels % WIDTH
    for s in tl.static_range(SCALES):
        blocks = end // RATIO**s
        complete = live & (end % RATIO**s == 0)
        ring = taps_ptr + s * TAPS * depth
        # The slot written is none of those read below: the ring holds all taps, the new one too.
        tl.store(ring + (blocks - 1) % TAPS * depth, token, mask=exists & complete)
        if of_values:
            slot = offsets[s] + (blocks - 1) % sizes[s]
            tl.store(values_ptr + slot.to(tl.int64) * WIDTH, token, mask=exists & complete)
        else:
            out = scales_ptr + (row * SCALES + s) * depth + channels
            tl.store(out, tl.where(complete, token, 0.0), mask=exists)
        if s + 1 < SCALES:
            total = tl.zeros([CHANNELS], tl.float32)
            for i in tl.static_range(TAPS):
                position = blocks - TAPS + i
                tap = token
                if i < TAPS - 1:
                    seen = exists & live & (position >= 0)
                    tap = tl.load(ring + position % TAPS * depth, mask=seen, other=0.0)
                weight = 1.0 / RATIO
                if down is not None:
                    weight = tl.load(down[s] + i * depth + channels, mask=exists, other=0.0)
                    weight = weight.to(tl.float32)
                total += tap.to(tl.float32) * weight
            token = total.to(token.dtype)


@triton.jit(do_not_specialize=["batch", "num_slots"])
def project_kernel(
    scales_ptr, weights, biases, frequencies_ptr, queries_ptr, keys_ptr, lengths_ptr, active_ptr,
    offsets, sizes, batch, depth, num_heads, num_slots,
    RATIO: tl.constexpr, FINE: tl.constexpr, SCALES: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rotated pairs of channels of one head's query or key of one scale, for rows that need it.

    ``weights``: queries' and keys' of scale 0, of scale 1, …. Queries go to ``[B, S, H, K]``, keys
    into their ring.
    """
    TILES: tl.constexpr = (HALF + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % num_heads
    matrix = tl.program_id(0) // TILES // num_heads
    s, is_key = matrix // 2, matrix % 2
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    end, live = load_progress(lengths_ptr, active_ptr, rows, rows < batch)
    stride = stride_of(s, RATIO, SCALES)
    blocks = end // stride
    needed = live & (end % stride == 0)
    source = s
    position = (blocks - 1).to(tl.float32)
    if FINE and is_key == 0:
        needed = live & (blocks > 0)
        source = s * 0
        position = end.to(tl.float32) / stride - 1.0
    if tl.max(needed.to(tl.int32), 0) > 0:
        half = tile * COLUMNS + tl.arange(0, COLUMNS)
        weight = pick(weights, matrix) + tl.cast(head, tl.int64) * 2 * HALF * depth
        x_ptr = scales_ptr + source * depth
        first = tl.zeros([ROWS, COLUMNS], tl.float32)
        second = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, depth, DEPTH):
            inner = at + tl.arange(0, DEPTH)
            x = _load_rows(x_ptr, rows, SCALES * depth, inner, batch, depth)
            w = _load_rows(weight, half, depth, inner, HALF, depth)
            first = tl.dot(x, tl.trans(w), first, input_precision=PRECISION)
            w = _load_rows(weight + HALF * depth, half, depth, inner, HALF, depth)
            second = tl.dot(x, tl.trans(w), second, input_precision=PRECISION)
        if biases is not None:
            bias = pick(biases, matrix) + head * 2 * HALF
            first += _load_bias(bias, half, HALF)[None, :]
            second += _load_bias(bias + HALF, half, HALF)[None, :]
        frequency = tl.load(frequencies_ptr + half, mask=half < HALF, other=0.0)
        angle = position[:, None] * frequency[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        row = rows.to(tl.int64)
        if is_key:
            slot = pick(offsets, s) + (blocks - 1) % pick(sizes, s)
            out = keys_ptr + ((row * num_heads + head) * num_slots + slot) * (2 * HALF)
        else:
            out = queries_ptr + ((row * SCALES + s) * num_heads + head) * (2 * HALF)
        out = out[:, None] + half[None, :]
        mask = needed[:, None] & (half < HALF)[None, :]
        kind = keys_ptr.dtype.element_ty
        tl.store(out, (first * cos - second * sin).to(kind), mask=mask)
        tl.store(out + HALF, (second * cos + first * sin).to(kind), mask=mask)
