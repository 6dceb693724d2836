# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# ruff: noqa: RUF005
# (Triton compiles the kernels below; their Python types say nothing, and it has no starred tuples.)
"""Kernels of a decoding step from attention on: every scale's keys in parts, then fusion.

A new token sees all that its scale's ring holds, so there is no mask but the ring's end, and order
does not matter. One query meets each key once: nothing to gain from matrix products, everything
from reading in long runs by many programs. A part of a ring that holds no token yet, or a scale
whose query is not due (coarse queries, no block complete), costs a program that exits at once.
"""

import triton
import triton.language as tl

from maha_attn.ops.triton.decode_tokens import load_progress, pick, stride_of
from maha_attn.ops.triton.small_qp import FAR, certify, largest, solve, total


@triton.jit(do_not_specialize=["batch", "num_slots", "num_parts"])
def attention_kernel(
    queries_ptr, keys_ptr, values_ptr, partial_ptr, lse_ptr, lengths_ptr, active_ptr,
    offsets, sizes, starts, batch, num_heads, num_slots, num_parts, scale,
    RATIO: tl.constexpr, FINE: tl.constexpr, SCALES: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Attention of one row and head to one part of one scale's ring.

    ``starts``: each scale's first part. Writes a normalised output and its base-2 log-sum-exp. Each
    of the ``KEYS`` lanes runs a softmax of its own, joined at the end.
    """
    head = tl.program_id(0) % num_heads
    row = tl.cast(tl.program_id(0) // num_heads % batch, tl.int64)
    part = tl.program_id(0) // num_heads // batch
    end, live = load_progress(lengths_ptr, active_ptr, row, row >= 0)
    s = 0
    for i in tl.static_range(1, SCALES):
        s += (part >= starts[i]).to(tl.int32)
    stride = stride_of(s, RATIO, SCALES)
    first = (part - pick(starts, s)) * PART
    filled = tl.minimum(end // stride, pick(sizes, s))
    if not FINE:
        filled = tl.where(end % stride == 0, filled, 0)
    if live & (first < filled):
        columns = tl.arange(0, PADDED)[None, :]
        exists = columns < WIDTH
        query = queries_ptr + ((row * SCALES + s) * num_heads + head) * WIDTH + columns
        q = tl.load(query, mask=exists, other=0.0).to(tl.float32) * scale
        ring = ((row * num_heads + head) * num_slots + pick(offsets, s)) * WIDTH
        slots = tl.arange(0, KEYS)
        top = tl.full([KEYS], -1e30, tl.float32)
        mass = tl.zeros([KEYS], tl.float32)
        acc = tl.zeros([KEYS, PADDED], tl.float32)
        for at in range(first, tl.minimum(first + PART, filled), KEYS):
            real = at + slots < filled
            inside = ring + (at + slots).to(tl.int64)[:, None] * WIDTH + columns
            mask = real[:, None] & exists
            k = tl.load(keys_ptr + inside, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(values_ptr + inside, mask=mask, other=0.0).to(tl.float32)
            score = tl.where(real, tl.sum(q * k, 1), float("-inf"))
            new_top = tl.maximum(top, score)
            decay = tl.exp2(top - new_top)
            p = tl.exp2(score - new_top)
            mass = mass * decay + p
            acc = acc * decay[:, None] + p[:, None] * v
            top = new_top
        highest = tl.max(top, 0)
        share = tl.exp2(top - highest)
        mass = tl.sum(mass * share, 0)
        out = tl.sum(acc * share[:, None], 0) / mass
        index = (row * num_heads + head) * num_parts + part
        column = tl.arange(0, PADDED)
        tl.store(partial_ptr + index * WIDTH + column, out, mask=column < WIDTH)
        tl.store(lse_ptr + index, highest + tl.log2(mass))


@triton.jit
def _join(
    partial_ptr, lse_ptr, first, count, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Output of one scale out of ``count`` parts from ``first`` on; 0 where there is none."""
    columns = tl.arange(0, PADDED)
    top = tl.full([1], -1e30, tl.float32)
    mass = tl.zeros([1], tl.float32)
    acc = tl.zeros([PADDED], tl.float32)
    for at in range(0, count, PARTS):
        parts = at + tl.arange(0, PARTS)
        lse = tl.load(lse_ptr + first + parts, mask=parts < count, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(lse - new_top)
        inside = (first + parts)[:, None] * WIDTH + columns[None, :]
        mask = (parts < count)[:, None] & (columns < WIDTH)[None, :]
        out = tl.load(partial_ptr + inside, mask=mask, other=0.0)
        acc = acc * decay + tl.sum(p[:, None] * out, 0)
        mass = mass * decay + tl.sum(p, 0)
        top = new_top
    return acc / tl.where(mass > 0, mass, 1.0)


@triton.jit(do_not_specialize=["num_parts"])
def fuse_kernel(
    partial_ptr, lse_ptr, outputs_ptr, v_ptr, target_ptr, logits_ptr, gate_ptr, log_gram_ptr,
    fused_ptr, weights_ptr, residual_ptr, status_ptr, lengths_ptr, active_ptr,
    sizes, starts, num_heads, num_parts, scale, ridge, sparsity, temperature,
    METHOD: tl.constexpr, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr, TARGET: tl.constexpr,
    RATIO: tl.constexpr, FINE: tl.constexpr, SCALES: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the parts of every scale, and fuse the scales, for one row and head.

    Outputs, problem and weights as in `maha_attn.ops.fusion`; a scale without a new output has the
    one of its last complete block, from ``outputs`` ``[B, H, S, K]``.
    """
    head, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    end, live = load_progress(lengths_ptr, active_ptr, row, row >= 0)
    problem = row * num_heads + head
    columns = tl.arange(0, PADDED)
    exists = columns < WIDTH
    kind = fused_ptr.dtype.element_ty
    u, logits = (), ()
    for s in tl.static_range(SCALES):
        blocks = end // RATIO**s
        fresh = live & (blocks > 0)
        if not FINE:
            fresh = fresh & (end % RATIO**s == 0)
        filled = tl.where(fresh, tl.minimum(blocks, sizes[s]), 0)
        first = problem * num_parts + starts[s]
        out = _join(partial_ptr, lse_ptr, first, tl.cdiv(filled, PART), WIDTH, PADDED, PARTS)
        out = out.to(kind)
        if not FINE:
            last = outputs_ptr + (problem * SCALES + s) * WIDTH + columns
            out = tl.where(fresh, out, tl.load(last, mask=exists, other=0.0))
            tl.store(last, out, mask=exists & fresh)
        u = u + (out.to(tl.float32),)
        value = tl.zeros([1], tl.float32)
        if logits_ptr is not None:
            value += tl.load(logits_ptr + head * SCALES + s).to(tl.float32)
        if gate_ptr is not None:
            value += tl.load(gate_ptr + problem * SCALES + s)
        if s > 0 and METHOD != "convex" and METHOD != "nash":
            value = tl.where(blocks > 0, value, float("-inf"))
        logits = logits + (value,)
    if METHOD == "convex" or METHOD == "nash":
        if TARGET == "value":
            y = tl.load(v_ptr + problem * WIDTH + columns, mask=exists, other=0.0).to(tl.float32)
        elif TARGET == "learned":
            y = tl.load(target_ptr + problem * WIDTH + columns, mask=exists, other=0.0)
            y = y.to(tl.float32)
        else:
            y = u[0]
        gamma = tl.full([1], 1.0, tl.float32)
        if log_gram_ptr is not None:
            gamma = tl.exp(tl.load(log_gram_ptr + head).to(tl.float32)) * gamma
        M, q = (), ()
        for i in tl.static_range(SCALES):
            entries = ()
            for j in tl.static_range(SCALES):
                if j < i:
                    entries = entries + (M[j][i],)
                else:
                    value = gamma * tl.sum(u[i] * u[j], 0) * scale
                    if i == j:
                        value += ridge
                    entries = entries + (value,)
            M = M + (entries,)
            if METHOD == "nash":
                value = M[i][i] - ridge - sparsity
            else:
                value = logits[i] - sparsity
                if TARGET != "none":
                    value += tl.sum(u[i] * y, 0) * scale
            if i > 0:
                value = tl.where(end >= RATIO**i, value, -FAR)
            q = q + (value,)
        w = solve(M, q, temperature, CONSTRAINT, SOFT)
        if residual_ptr is not None:
            one = tl.arange(0, 1)
            residual, status = certify(M, q, w, temperature, CONSTRAINT, SOFT)
            tl.store(residual_ptr + problem + one, residual)
            tl.store(status_ptr + problem + one, status.to(tl.int8))
    else:
        top = largest(logits)
        e, w = (), ()
        for s in tl.static_range(SCALES):
            e = e + (tl.exp(logits[s] - top),)
        mass = total(e)
        for s in tl.static_range(SCALES):
            w = w + (e[s] / mass,)
    fused = tl.zeros([PADDED], tl.float32)
    for s in tl.static_range(SCALES):
        tl.store(weights_ptr + problem * SCALES + s + tl.arange(0, 1), w[s])
        fused += w[s] * u[s]
    tl.store(fused_ptr + problem * WIDTH + columns, fused.to(kind), mask=exists)
