"""Attention's cost in query-key pairs and FLOPs: closed form, and executed (formulation §8).

For MAHA's layer in detail (`attention_cost`), for every registered attention alike (`count`).

*Visible* pairs are those that the definition lets a query see. *Executed* is what torch's own
counter says of the operators that run, edge blocks and all; counted on the ``meta`` device, where
shapes run and numbers don't, so any length costs nothing.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maha_attn.baselines import ATTENTIONS, build_attention
from maha_attn.bench.measure import Work
from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.ops.pyramid import coarse_length
from maha_attn.ops.scale_attention import scale_attention
from maha_attn.spec import AttentionSpec


@dataclass(frozen=True)
class AttentionCost:
    """Cost of one row of ``length`` tokens.

    Attributes:
        length: Tokens.
        visible_pairs: Query-key pairs of all scales, per head.
        full_visible_pairs: The same of full attention.
        executed_pairs: Pairs that the operators compute, per head.
        attention_flops: Executed FLOPs of QKᵀ and PV, ``4·D`` a pair.
        full_attention_flops: What the counter says of full attention: all ``N²`` pairs.
        layer_flops: Executed FLOPs of the whole layer.
    """

    length: int
    visible_pairs: int
    full_visible_pairs: int
    executed_pairs: int
    attention_flops: int
    full_attention_flops: int
    layer_flops: int


def attention_cost(spec: AttentionSpec, length: int) -> AttentionCost:
    """Count what a layer of ``spec`` costs at ``length`` tokens, forward."""
    attention_flops = 0
    for s, keys in enumerate(_lengths(spec, length)):
        fine = spec.queries == "fine" and s > 0
        q, k = (
            torch.empty(1, spec.num_heads, n, spec.head_dim, device="meta")
            for n in (length if fine else keys, keys)
        )
        with FlopCounterMode(display=False) as counter:
            scale_attention(
                q,
                k,
                k,
                window=spec.spans[s],
                causal=spec.causal,
                stride=spec.strides[s] if fine else 1,
            )
        attention_flops += counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        MultiscaleAttention(spec)(torch.empty(1, length, spec.hidden_size))
    per_pair = 4 * spec.hidden_size
    return AttentionCost(
        length=length,
        visible_pairs=visible_pairs(spec, length),
        full_visible_pairs=length * (length + 1) // 2 if spec.causal else length**2,
        executed_pairs=attention_flops // per_pair,
        attention_flops=attention_flops,
        full_attention_flops=per_pair * length**2,
        layer_flops=counter.get_total_flops(),
    )


def layer_work(spec: AttentionSpec, length: int, rows: int) -> Work:
    """What a layer of ``spec`` has to compute for so many rows of ``length`` tokens."""
    cost = attention_cost(spec, length)
    return Work(
        attention=4 * spec.hidden_size * rows * cost.visible_pairs,
        projections=rows * (cost.layer_flops - cost.attention_flops),
    )


@dataclass(frozen=True)
class Count:
    """Size of any registered attention's layer, and its forward FLOPs for one row.

    Attributes:
        parameters: Of the layer; linformer's grow with the length that it is made for.
        attention_flops: Executed, beside the layer's projections, pyramid and fusion: of full
            attention QKᵀ and PV.
        layer_flops: Executed, of the whole layer.
        closed_form_flops: Of the attention, by its definition; None where it has no closed form.
    """

    parameters: int
    attention_flops: int
    layer_flops: int
    closed_form_flops: int | None


def count(name: str, spec: AttentionSpec, length: int) -> Count:
    """Count a layer of the attention ``name`` on the ``meta`` device, in evaluation.

    A multiply-add is 2 FLOPs. The counter sees matrix products, convolutions and
    scaled-dot-product attention; not sums, scans, triangular systems, nor kernels from elsewhere.

    Raises:
        ModuleNotFoundError, ValueError: As `build_attention`.
    """
    with torch.device("meta"):
        layer: Any = build_attention(name, spec, max_length=length).to("meta").eval()
        x = torch.empty(1, length, spec.hidden_size)
    parameters = sum(p.numel() for p in layer.parameters())
    if ATTENTIONS[name].cache:
        cost = attention_cost(layer.spec, length)
        closed_form = 4 * spec.hidden_size * cost.visible_pairs
        return Count(parameters, cost.attention_flops, cost.layer_flops, closed_form)
    projections = 0

    def add(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal projections
        projections += 2 * output.numel() * cast(nn.Linear, module).in_features

    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    total = counter.get_total_flops()
    return Count(parameters, total - projections, total, layer.attention_flops(length))


def visible_pairs(spec: AttentionSpec, length: int) -> int:
    """Query-key pairs that formulation §2 makes visible, all scales, per head; closed form."""
    total = 0
    for s, keys in enumerate(_lengths(spec, length)):
        stride = spec.strides[s] if spec.queries == "fine" else 1
        queries = length if spec.queries == "fine" else keys
        span = spec.spans[s]
        if spec.causal:
            width = keys if span is None else min(span, keys)
            # Keys e = 0 … keys-1 are the last seen by `stride` queries each, the final one by the
            # rest; a query whose last key is e sees min(e + 1, width).
            before_last = _ramp(keys - 1, width)
            rest = queries - stride * keys + 1
            total += stride * before_last + rest * width
        else:
            reach = keys - 1 if span is None else min(span // 2, keys - 1)
            pairs = keys * (2 * reach + 1) - reach * (reach + 1)
            missing = stride * keys - queries  # queries that the last, partial block lacks
            total += stride * pairs - missing * (reach + 1)
    return total


def _ramp(count: int, width: int) -> int:
    """``Σ_{e < count} min(e + 1, width)``."""
    rising = min(count, width)
    return rising * (rising + 1) // 2 + (count - rising) * width


def _lengths(spec: AttentionSpec, length: int) -> list[int]:
    """Tokens of every scale that the input has."""
    lengths = [length]
    for _ in range(spec.num_scales - 1):
        lengths.append(coarse_length(lengths[-1], spec.ratio, causal=spec.causal))
    return [n for n in lengths if n > 0]
