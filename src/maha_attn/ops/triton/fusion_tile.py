"""Device functions of the fusion kernels: a tile of tokens and heads, and its problems.

Tokens are counted from ``t' = t + shift`` with shift 1 when causal, else 0: the block of scale
``s`` that token ``t`` sees is then ``⌊t'/r^s⌋``, stored in row ``⌊t'/r^s⌋ - shift``, and a tile of
``TOKENS`` aligned tokens holds whole blocks. Upsampling is a broadcast in registers.

Deliberate: a program is one warp with one problem a lane, so that nothing waits for a barrier and
the solver runs in registers (`small_qp`). A tile is ``[T, C]``: tokens in registers, and over the
lanes, as they lie in memory, ``C/G`` channels of each of ``G`` heads. A head has as many lanes as
the tile has tokens, so sums over its channels end with one token a lane: problems, ``[G · T]``.
"""

# A kernel's parameters have no Python types, and its language no starred expressions.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def upsample(x, ROWS: tl.constexpr):
    """Repeat each row of ``[R, C]`` so that there are ``ROWS``."""
    if x.shape[0] == ROWS:
        return x
    else:
        wide = tl.broadcast_to(x[:, None], x.shape[0], ROWS // x.shape[0], x.shape[1])
        return tl.reshape(wide, ROWS, x.shape[1])


@triton.jit
def sum_blocks(x, ROWS: tl.constexpr):
    """Sum ``[T, C]`` over runs of tokens so that there are ``ROWS``."""
    if x.shape[0] == ROWS:
        return x
    else:
        return tl.sum(tl.reshape(x, ROWS, x.shape[0] // ROWS, x.shape[1]), 1)


@triton.jit
def exchange(x):
    """Sum ``[R, D, L]`` over ``L`` lanes, each of which keeps one of ``L`` tokens: ``[D · L]``.

    A row belongs to ``L/R`` tokens. Lanes exchange halves of what they hold: ``L - 1`` shuffles
    instead of the ``L log L`` of sums that every lane keeps.
    """
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    L: tl.constexpr = x.shape[2]
    if L == 1:
        return tl.reshape(x, D)
    elif R == 1:
        return tl.reshape(tl.broadcast_to(tl.sum(x, 2)[:, :, None], 1, D, L), D * L)
    else:
        halves = tl.permute(tl.reshape(x, 2, R // 2, D, 2, L // 2), 1, 2, 3, 4, 0)
        early, late = tl.split(halves)
        upper = tl.arange(0, 2)[None, None, :, None] == 1
        kept, given = tl.where(upper, late, early), tl.where(upper, early, late)
        return exchange(tl.reshape(kept + tl.flip(given, 2), R // 2, 2 * D, L // 2))


@triton.jit
def addresses(
    ptr, strides, row, first_head, tile, piece, num_tokens,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to, and existence of, a piece ``[R, G · PIECE]`` of a tile at stride ``STRIDE``.

    ``OFFSET``: the stored row of block 0 is ``-OFFSET``. Rows of blocks before the first or without
    a token do not exist.
    """
    first = tile * TOKENS // STRIDE
    block = tl.arange(0, max(TOKENS // STRIDE, 1))[:, None]
    lane = tl.arange(0, HEADS * PIECE)[None]
    column = piece * PIECE + lane % PIECE
    exists = (first + block) * STRIDE < num_tokens + SHIFT
    if SHIFT:
        exists = exists & (first + block >= 1)
    if WIDTH % PIECE > 0:
        exists = exists & (column < WIDTH)
    start = ptr + row * strides[0] + first_head.to(tl.int64) * strides[1]
    start += (tl.cast(first, tl.int64) - OFFSET) * strides[2]
    return start + (block * strides[2] + lane // PIECE * strides[1] + column), exists


@triton.jit
def load(
    ptr, strides, row, first_head, tile, piece, num_tokens,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, AVAILABLE: tl.constexpr, SHIFT: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, AGAIN: tl.constexpr, carried,
):  # fmt: skip
    """A piece of a scale's output, zero where it does not exist or, fine, is not available.

    ``AGAIN``: read a second time, for the last time. ``carried``: its pointers, or None.
    """
    pointers, exists = addresses(
        ptr, strides, row, first_head, tile, piece, num_tokens,
        TOKENS, STRIDE, SHIFT, SHIFT, HEADS, PIECE, WIDTH,
    )  # fmt: skip
    if carried is not None:
        pointers = carried
    if STRIDE < AVAILABLE:
        exists = exists & (tile * TOKENS + tl.arange(0, TOKENS)[:, None] >= AVAILABLE * SHIFT)
    policy: tl.constexpr = "evict_first" if AGAIN else ""
    return tl.load(pointers, mask=exists, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def load_scales(
    ptrs, strides, row, first_head, tile, piece, num_tokens,
    RATIO: tl.constexpr, FINE: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, AGAIN: tl.constexpr, carried,
):  # fmt: skip
    """`load` for every scale."""
    result = ()
    for s in tl.static_range(len(ptrs)):
        result = result + (
            load(
                ptrs[s], strides[s], row, first_head, tile, piece, num_tokens,
                TOKENS, 1 if FINE else RATIO**s, RATIO**s, SHIFT, HEADS, PIECE, WIDTH, AGAIN,
                None if carried is None else carried[s],
            ),
        )  # fmt: skip
    return result


@triton.jit
def first_pieces(
    ptrs, strides, row, first_head, tile, num_tokens,
    RATIO: tl.constexpr, FINE: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to the first piece of every scale, for a loop to carry.

    They shorten compilation alone: for each access by pointers that an operation computes, not a
    loop carries, triton follows all that is connected with it, in quadratic time.
    """
    result = ()
    for s in tl.static_range(len(ptrs)):
        pointers, _ = addresses(
            ptrs[s], strides[s], row, first_head, tile, 0, num_tokens,
            TOKENS, 1 if FINE else RATIO**s, SHIFT, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
        result = result + (pointers,)
    return result


@triton.jit
def next_pieces(pointers, PIECE: tl.constexpr):
    """Pointers to the next piece of every scale."""
    result = ()
    for s in tl.static_range(len(pointers)):
        result = result + (pointers[s] + PIECE,)
    return result


@triton.jit
def combine(w, u, TOKENS: tl.constexpr):
    """``Σ_s w_s u_s`` for every token; ``w`` from `tile_weights`."""
    result = w[0] * upsample(u[0], TOKENS)
    for s in tl.static_range(1, len(w)):
        result += w[s] * upsample(u[s], TOKENS)
    return result


@triton.jit
def products(a, b, HEADS: tl.constexpr, LANES: tl.constexpr):
    """``Σ_k a_k b_k`` over each lane's channels, for every row of the finer: ``[R, G, LANES]``."""
    ROWS: tl.constexpr = max(a.shape[0], b.shape[0])
    both = upsample(a, ROWS) * upsample(b, ROWS)
    return tl.sum(tl.reshape(both, ROWS, HEADS, LANES, both.shape[1] // (HEADS * LANES)), 3)


@triton.jit
def empty_sum(STRIDE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """`products` of nothing, the finer tensor at stride ``STRIDE``."""
    ROWS: tl.constexpr = max(TOKENS // STRIDE, 1)
    return tl.zeros((ROWS, HEADS, TOKENS), tl.float32)


@triton.jit
def gram_matrix(
    u_ptrs, u_strides, y_ptr, y_strides, row, first_head, tile, num_tokens, scale,
    RATIO: tl.constexpr, FINE: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    GRAM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """``G = UUᵀ/√K`` as rows (where ``GRAM``) and ``Uy`` (where ``y_ptr``), of every problem."""
    S: tl.constexpr = len(u_ptrs)
    sums = ()
    if LOOP:
        for i in tl.static_range(S if GRAM else 0):
            for _ in tl.static_range(i, S):
                sums = sums + (empty_sum(1 if FINE else RATIO**i, HEADS, TOKENS),)
        for _ in tl.static_range(0 if y_ptr is None else S):
            sums = sums + (empty_sum(1, HEADS, TOKENS),)
    at = None
    if LOOP:
        at = first_pieces(
            u_ptrs, u_strides, row, first_head, tile, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH,
        )  # fmt: skip
        if y_ptr is not None:
            at = at + first_pieces(
                (y_ptr,), (y_strides,), row, first_head, tile, num_tokens,
                RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH,
            )  # fmt: skip
    for piece in (tl.range if LOOP else tl.static_range)(0, (WIDTH + PIECE - 1) // PIECE):
        u = load_scales(
            u_ptrs, u_strides, row, first_head, tile, piece, num_tokens,
            RATIO, FINE, TOKENS, SHIFT, HEADS, PIECE, WIDTH, False, at,
        )  # fmt: skip
        parts = ()
        if GRAM:
            for i in tl.static_range(S):
                for j in tl.static_range(i, S):
                    parts = parts + (products(u[i], u[j], HEADS, TOKENS),)
        if y_ptr is not None:
            y = load(
                y_ptr, y_strides, row, first_head, tile, piece, num_tokens,
                TOKENS, 1, 1, SHIFT, HEADS, PIECE, WIDTH, False,
                None if at is None else at[S],
            )  # fmt: skip
            for i in tl.static_range(S):
                parts = parts + (products(u[i], y, HEADS, TOKENS),)
        if LOOP:
            at = next_pieces(at, PIECE)
        old = sums
        sums = ()
        for n in tl.static_range(len(parts)):
            sums = sums + (old[n] + parts[n] if len(old) > 0 else parts[n],)
    rows, b = (), ()
    for i in tl.static_range(S if GRAM else 0):
        entries = ()
        for j in tl.static_range(S):
            if j < i:
                entries = entries + (rows[j][i],)
            else:
                entries = entries + (exchange(sums[i * S - i * (i - 1) // 2 + j - i]) * scale,)
        rows = rows + (entries,)
    if y_ptr is not None:
        for i in tl.static_range(S):
            b = b + (exchange(sums[len(sums) - S + i]),)
    return rows, b


@triton.jit
def problem(gram, gamma_ptr, head, ridge):
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
def place(
    num_tokens, num_heads, num_tiles, HEADS: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """``row``, ``tile`` and first head of a program; head, ``t'`` and existence of its problems.

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
    return row, tile, first_head, head, token, real


@triton.jit
def small(ptr, strides, row, head, token, SHIFT: tl.constexpr):
    """Pointers to the program's problems in a ``[B, H, N, …]`` tensor."""
    start = ptr + row * strides[0] + head.to(tl.int64) * strides[1]
    return start + (token - SHIFT).to(tl.int64) * strides[2]


@triton.jit
def load_small(pointers, stride, real, S: tl.constexpr):
    """A number a problem and scale, zero for problems that do not exist."""
    result = ()
    for _ in tl.static_range(S):
        result = result + (tl.zeros(real.shape, tl.float32),)
    for s in (tl.range if S > 4 else tl.static_range)(0, S):
        value = tl.load(pointers, mask=real, other=0.0).to(tl.float32)
        old = result
        result = ()
        for i in tl.static_range(S):
            result = result + (tl.where(s == i, value, old[i]),)
        pointers += stride
    return result


@triton.jit
def store_small(pointers, stride, values, real):
    """Write what `load_small` reads."""
    S: tl.constexpr = len(values)
    for s in (tl.range if S > 4 else tl.static_range)(0, S):
        value = values[0]
        for i in tl.static_range(1, S):
            value = tl.where(s == i, values[i], value)
        tl.store(pointers, value, mask=real)
        pointers += stride


@triton.jit
def tile_weights(w, HEADS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr):
    """Weights of problems, ``[G · T]``, at each channel of the tile, ``[T, G · PIECE]``."""
    result = ()
    for s in tl.static_range(len(w)):
        heads = tl.trans(tl.reshape(w[s], HEADS, TOKENS))[:, :, None]
        wide = tl.broadcast_to(heads, TOKENS, HEADS, PIECE)
        result = result + (tl.reshape(wide, TOKENS, HEADS * PIECE),)
    return result


@triton.jit
def split_tokens(x, PARTS: tl.constexpr):
    """Tiles ``[T, C]`` by runs of ``T/PARTS`` tokens: of each run, a tuple of all tiles."""
    if PARTS == 1:
        return (x,)
    else:
        first, second = (), ()
        for s in tl.static_range(len(x)):
            halves = tl.reshape(x[s], 2, x[s].shape[0] // 2, x[s].shape[1])
            early, late = tl.split(tl.permute(halves, 1, 2, 0))
            first, second = first + (early,), second + (late,)
        return split_tokens(first, PARTS // 2) + split_tokens(second, PARTS // 2)
