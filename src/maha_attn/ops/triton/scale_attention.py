"""The attention of every scale by kernels: forward, and two backward passes without atomics.

The operators, their derivative and what they cost; kernels are in `scale_attention_forward` and
`scale_attention_backward`, what a tile is in `scale_attention_tile`, tile sizes in
`scale_attention_tiling`.

Rotary embedding rides along: queries are turned where they are loaded, the gradients of queries and
keys are turned back where they are stored, and only the keys, which many tiles read, are turned by
a kernel of their own (`maha_attn.ops.triton.rotary`).

Deliberate: all softmax arithmetic is fp32 in base 2; outputs and gradients are written as
``[B, N, H, K]`` memory, as the projections read them; each output element has one writer and one
order of summation, so results repeat bit for bit.
"""

# A kernel is called with plain numbers.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.triton.memory import empty_by_token, unit_last
from maha_attn.ops.triton.operator import operator
from maha_attn.ops.triton.rotary import turn
from maha_attn.ops.triton.scale_attention_backward import keys_kernel, queries_kernel
from maha_attn.ops.triton.scale_attention_forward import forward_kernel
from maha_attn.ops.triton.scale_attention_tiling import Scale, constants, executed_pairs
from maha_attn.ops.triton.sizes import cdiv, next_power_of_2


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
        [unit_last(t) for t in qs],
        [unit_last(t) for t in ks],
        [unit_last(t) for t in vs],
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


@operator("maha::multiscale_attention")
def _attend(
    qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor],
    query_tables: Sequence[Tensor], key_table: Tensor | None, lengths: Sequence[Tensor],
    backs: Sequence[int], aheads: Sequence[int], strides: Sequence[int], causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Of every scale, the outputs; then base-2 log-sum-exps; with tables, rotated queries and keys.

    ``lengths``: none, or ``[B]`` of every scale.
    """
    outputs, lses, turned_q, turned_k = _empty_results(qs, ks, query_tables)
    for s, scale in enumerate(map(Scale, backs, aheads, strides)):
        q, k = qs[s], ks[s]
        if key_table is not None:
            turn(k, key_table, turned_k[s], 1.0)
            k = turned_k[s]
        (batch, heads, length, width), num_keys = q.shape, k.shape[2]
        compiled_for = constants("forward", q, scale, causal)
        num_tiles = cdiv(length, compiled_for["QUERIES"])
        with torch.cuda.device_of(q):
            forward_kernel[(num_tiles * heads * batch,)](
                q, k, vs[s], outputs[s], lses[s], lengths[s] if lengths else None,
                query_tables[s] if query_tables else None, turned_q[s] if turned_q else None,
                *q.stride()[:3], *k.stride()[:3], *vs[s].stride()[:3], *outputs[s].stride()[:3],
                length, num_keys, heads, num_tiles, batch, scale.stride, scale.back, scale.ahead,
                math.log2(math.e) / math.sqrt(width), **compiled_for,
            )  # fmt: skip
    return [*outputs, *lses, *turned_q, *turned_k]


@operator("maha::multiscale_attention_backward")
def _attend_backward(
    dos: Sequence[Tensor | None], qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor],
    outputs: Sequence[Tensor], lses: Sequence[Tensor],
    query_tables: Sequence[Tensor], key_table: Tensor | None, lengths: Sequence[Tensor],
    backs: Sequence[int], aheads: Sequence[int], strides: Sequence[int], causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of all queries, then keys, then values; ``qs`` and ``ks`` are the rotated ones."""
    gradients = _empty_gradients(qs, ks, vs)
    for s, scale in enumerate(map(Scale, backs, aheads, strides)):
        q, k, v, do = qs[s], ks[s], vs[s], dos[s]
        dq, dk, dv = gradients[s :: len(qs)]
        if do is None:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            continue
        do = unit_last(do)
        table = query_tables[s] if query_tables else None
        _launch_backward(
            q, k, v, outputs[s], do, lses[s], lengths[s] if lengths else None, dq, dk, dv,
            table, key_table, scale, causal,
        )  # fmt: skip
    return gradients


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, lengths: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, query_table: Tensor | None, key_table: Tensor | None,
    scale: Scale, causal: bool,
) -> None:  # fmt: skip
    """Both backward passes of one scale."""
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    delta = torch.empty_like(lse)
    softmax_scale = 1 / math.sqrt(width)
    # A tile's halves can be split in registers where the width is a power of 2.
    inside = width == next_power_of_2(width) and width >= 16
    numbers = (scale.stride, scale.back, scale.ahead, math.log2(math.e) * softmax_scale)
    with torch.cuda.device_of(q):
        compiled_for = constants("queries", q, scale, causal)
        num_tiles = cdiv(length, compiled_for["QUERIES"])
        queries_kernel[(num_tiles * heads * batch,)](
            q, k, v, o, do, dq, lse, delta, lengths, query_table if inside else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
            length, num_keys, heads, num_tiles, batch, *numbers, softmax_scale, **compiled_for,
        )  # fmt: skip
        compiled_for = constants("keys", q, scale, causal)
        num_tiles = cdiv(num_keys, compiled_for["KEYS"])
        if num_keys:
            keys_kernel[(num_tiles * heads * batch,)](
                q, k, v, do, dk, dv, lse, delta, lengths, key_table if inside else None,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                length, num_keys, heads, num_tiles, batch, *numbers, softmax_scale, **compiled_for,
            )  # fmt: skip
    if not inside:
        for gradient, table in ((dq, query_table), (dk, key_table)):
            if table is not None:
                turn(gradient, table, gradient, -1.0)


def _empty_results(
    qs: Sequence[Tensor], ks: Sequence[Tensor], query_tables: Sequence[Tensor]
) -> tuple[list[Tensor], ...]:
    """Outputs, log-sum-exps, and, with tables, rotated queries and keys."""
    lses = [q.new_empty(q.shape[:3], dtype=torch.float32) for q in qs]
    turned = ([empty_by_token(t) for t in ts] if query_tables else [] for ts in (qs, ks))
    return [empty_by_token(q) for q in qs], lses, *turned


def _empty_gradients(
    qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor]
) -> list[Tensor]:
    return [empty_by_token(t) for t in (*qs, *ks, *vs)]


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


_attend.register_autograd(_differentiate, save=_save)


def _pairs(kernel: str, qs, ks, backs, aheads, strides, causal) -> int:
    """`executed_pairs` of all scales."""
    scales = map(Scale, backs, aheads, strides)
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
