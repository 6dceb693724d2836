# pyright: reportCallIssue=false, reportArgumentType=false
"""One decoding step of a whole layer: five launches, whatever the number of scales.

Projections of the token, the pyramid, queries and keys of every scale (rotated, keys written to
their rings), attention to all rings in parts, and the joining of the parts with fusion. Where each
row is, is read on the device: nothing here waits for it, so a step can be captured in a CUDA graph
and replayed for the tokens that follow.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maha_attn.ops.rotary import rotary_frequencies
from maha_attn.ops.triton.decode_attention import attention_kernel, fuse_kernel
from maha_attn.ops.triton.decode_tokens import linear_kernel, project_kernel, pyramid_kernel
from maha_attn.ops.triton.sizes import cdiv, next_power_of_2

PART = 256
"""Keys that one program attends to: enough programs at 8K keys of one row, few to join."""


@torch.library.custom_op(
    "maha::decode", mutates_args=("lengths", "taps", "keys", "values", "outputs")
)
def decode(
    x: Tensor, active: Tensor | None,
    lengths: Tensor, taps: Tensor, keys: Tensor, values: Tensor, outputs: Tensor,
    v_weight: Tensor, v_bias: Tensor | None, target_weight: Tensor | None,
    target_bias: Tensor | None, gate_weight: Tensor | None,
    qk_weights: Sequence[Tensor], qk_biases: Sequence[Tensor], down: Sequence[Tensor],
    logits: Tensor | None, log_gram: Tensor | None,
    sizes: Sequence[int], ratio: int, fine: bool, theta: float, method: str, constraint: str,
    target: str, ridge: float, sparsity: float, temperature: float, certified: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Continue every row by one token.

    Args:
        x: ``[B, D]``, bf16, fp16 or fp32 as all weights.
        active: ``[B]`` bool, the rows that have a token; None: all. The others' state does not
            change, and their output is unused.
        lengths, taps, keys, values, outputs: `maha_attn.layers.cache.CacheState`, changed in place.
        v_weight, v_bias: The value projection; a weight is ``[out, in]``, a bias ``[out]``.
        target_weight, target_bias, gate_weight: Fusion's projections of the token, if it has them.
        qk_weights, qk_biases: Of queries and keys of scale 0, of scale 1, …; all biases or none.
        down: ``[k, D]`` of each pyramid step; empty: block means.
        logits, log_gram: ``[H, S]`` and ``[H]`` of `maha_attn.layers.fusion.ScaleFusion`.
        sizes: Slots of each scale in ``keys`` and ``values``.
        ratio: ``r``.
        fine: Every token queries every scale.
        theta: Base of the rotary embedding.
        method, constraint, target, ridge, sparsity, temperature: The fusion problem.
        certified: Fill residual and status.

    Returns:
        Fused heads ``[B, D]``, weights ``[B, H, S]`` fp32, residual and status ``[B, H]`` (empty
        where not asked for).

    Cost: all weights are read once, and of the rings what a row's due queries see.
    """
    x, (batch, depth), (heads, slots, width) = x.contiguous(), x.shape, keys.shape[1:]
    num_scales = outputs.shape[2]
    fused, weights, residual, status = _empty_results(x, outputs, certified)
    v, learned = torch.empty_like(x), x.new_empty(x.shape if target_weight is not None else (0,))
    gate = x.new_empty(batch, heads * num_scales, dtype=torch.float32)
    new = x.new_empty(batch, num_scales, depth)
    queries = x.new_empty(batch, num_scales, heads, width)
    parts = [cdiv(size, PART) for size in sizes]
    partial = x.new_empty(batch, heads, sum(parts), width, dtype=torch.float32)
    lse = x.new_empty(batch, heads, sum(parts), dtype=torch.float32)
    offsets, starts = _begins(sizes), _begins(parts)
    common = {"RATIO": ratio, "SCALES": num_scales}
    wide = {"WIDTH": width, "PADDED": next_power_of_2(width), "FINE": fine, "PART": PART}
    rows = min(max(next_power_of_2(batch), 16), 64)
    wide_loads = x.dtype.itemsize == 2
    product = {"ROWS": rows, "DEPTH": 128 if wide_loads else 64}
    product["PRECISION"] = "tf32" if wide_loads else "tf32x3"
    linears = [(v_weight, v_bias, v), (target_weight, target_bias, learned)]
    linears = [(w, b, out) for w, b, out in [*linears, (gate_weight, None, gate)] if w is not None]
    weights_in, biases_in, outs = (tuple(t) for t in zip(*linears, strict=True))
    columns = tuple(w.shape[0] for w in weights_in)
    with torch.cuda.device_of(x):
        linear_kernel[(sum(cdiv(n, 16) for n in columns), cdiv(batch, rows))](
            x, weights_in, biases_in, outs, columns, lengths, active, batch, depth,
            COLUMNS=16, **product,
        )  # fmt: skip
        pyramid_kernel[(cdiv(depth, 128), 2, batch)](
            x, v, taps, values, new, tuple(down) or None, lengths, active,
            offsets, tuple(sizes), depth, heads, slots,
            TAPS=taps.shape[3], WIDTH=width, CHANNELS=128, num_warps=1, **common,
        )  # fmt: skip
        pairs = min(max(next_power_of_2(width // 2), 16), 32)
        tiles = 2 * num_scales * heads * cdiv(width // 2, pairs)
        project_kernel[(tiles, cdiv(batch, rows))](
            new, tuple(qk_weights), tuple(qk_biases) or None,
            _frequencies(width, theta, x.device), queries, keys, lengths, active,
            offsets, tuple(sizes), batch, depth, heads, slots,
            FINE=fine, HALF=width // 2, COLUMNS=pairs, num_stages=4, **product, **common,
        )  # fmt: skip
        attention_kernel[(sum(parts) * heads * batch,)](
            queries, keys, values, partial, lse, lengths, active,
            offsets, tuple(sizes), starts, batch, heads, slots, sum(parts),
            math.log2(math.e) / math.sqrt(width), KEYS=64, **wide, **common,
        )  # fmt: skip
        fuse_kernel[(heads, batch)](
            partial, lse, outputs, v, learned, logits, gate if gate_weight is not None else None,
            log_gram, fused, weights, residual if certified else None,
            status if certified else None, lengths, active,
            tuple(sizes), starts, heads, sum(parts), width**-0.5, ridge, sparsity, temperature,
            METHOD=method, CONSTRAINT="box" if method == "nash" else constraint,
            SOFT=temperature > 0 and method == "convex", TARGET=target, PARTS=32, num_warps=1,
            **wide, **common,
        )  # fmt: skip
    return fused, weights, residual, status


@decode.register_fake
def _(x, active, lengths, taps, keys, values, outputs, *rest):
    return _empty_results(x, outputs, rest[-1])


def _empty_results(
    x: Tensor, outputs: Tensor, certified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, num_scales = outputs.shape[:3]
    weights = x.new_empty(batch, heads, num_scales, dtype=torch.float32)
    residual = weights.new_empty((batch, heads) if certified else (0,))
    status = torch.empty_like(residual, dtype=torch.int8)
    return x.new_empty(x.shape), weights, residual, status


def _begins(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each scale begins, one after another."""
    return tuple(sum(counts[:s]) for s in range(len(counts)))


@functools.cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The rotary embedding's; kept, since making them takes four launches."""
    return rotary_frequencies(head_dim, theta, torch.float32, device)


@register_flop_formula(torch.ops.maha.decode, get_raw=True)
def _flops(x, active, lengths, taps, keys, *rest, out_val=None, **_) -> int:
    """Every projection, and one query of each row and head for every slot.

    An upper bound: coarse queries are due every ``r^s`` steps, and rings may not be full yet.
    """
    v_weight, _, target_weight, _, gate_weight, qk_weights = rest[2:8]
    weights = [v_weight, target_weight, gate_weight, *qk_weights]
    columns = sum(w.shape[0] for w in weights if w is not None)
    return 2 * x.numel() * columns + 4 * keys.numel()
