"""Filling a cache from a full pass, and continuing a cached sequence by the work of its new tokens.

A scale does work only for the blocks that the new tokens complete. ``start`` and ``count`` of a row
are in tokens of the scale at hand: what it had, and what the new tokens add. Both live on the
device. On a GPU one new token goes through kernels (`maha_attn.ops.triton.decode`) where they serve
the layer; everything else is composed here, as are longer chunks with any backend.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.layers.cache import (
    AttentionCache,
    CacheState,
    find_tokens,
    ring_positions,
    take_rows,
    write_ring,
)
from maha_attn.layers.projection import is_plain
from maha_attn.ops.backend import use_triton
from maha_attn.ops.fusion import Fused
from maha_attn.ops.pyramid import combine, dilated_convolution, kernel_limit
from maha_attn.ops.rotary import rotate

if TYPE_CHECKING:
    from maha_attn.layers.attention import MultiscaleAttention

PIECE = 512
"""Tokens continued at once: bounds the masks of a long chunk to ``PIECE × (w + PIECE)``."""


@dataclass(frozen=True)
class Progress:
    """How far each row is at each scale.

    Attributes:
        starts, counts: ``[S, B]``, tokens of the scale before, and added by, the new tokens.
        most: Per scale, at least the most that any row adds, on the host.
    """

    starts: Tensor
    counts: Tensor
    most: list[int]

    @classmethod
    def of(
        cls, lengths: Tensor, counts: Tensor, strides: tuple[int, ...], length: int
    ) -> "Progress":
        """Rows of ``lengths`` tokens get ``counts`` more, none of them more than ``length``."""
        starts = torch.stack([lengths // stride for stride in strides])
        added = torch.stack([(lengths + counts) // stride for stride in strides]) - starts
        if added.is_cpu:  # Exact, since nobody waits for it: work that no row needs is left out.
            return cls(starts, added, added.amax(1).tolist())
        return cls(starts, added, [-(-length // stride) for stride in strides])


@torch.no_grad()
def fill(
    cache: AttentionCache,
    counts: Tensor,
    *,
    scales: list[Tensor],
    values: list[Tensor],
    gated: list[Tensor],
    keys: list[Tensor],
    outputs: list[Tensor],
) -> None:
    """Put into an empty cache what a full pass over the first tokens has computed.

    Args:
        cache: Empty.
        counts: ``[B]``, real tokens of each row; they stand at the front.
        scales, values, gated: ``X_s``, ``V_s`` and the inputs of the dilated convolution,
            ``[B, N_s, D]``, of the scales that the input has.
        keys: Rotated keys, ``[B, H, N_s, K]``.
        outputs: ``O_s``, ``[B, H, N_s, K]`` (coarse queries).
    """
    spec, x = cache.spec, scales[0]
    state = cache.reserve(x, x.shape[1])
    rings = list(zip(cache.parts(state.keys), cache.parts(state.values), strict=True))
    start = torch.zeros_like(counts)
    for s, stride in enumerate(spec.strides[: len(scales)]):
        count = counts // stride
        key_ring, value_ring = rings[s]
        write_ring(state.taps[:, 0, s], scales[s], start, count)
        write_ring(state.taps[:, 1, s], values[s], start, count)
        write_ring(state.context[:, s], gated[s], start, count)
        write_ring(key_ring, keys[s], start, count)
        write_ring(value_ring, _heads(values[s], spec.num_heads), start, count)
        if spec.queries == "coarse":
            write_ring(state.outputs[:, :, s, None], outputs[s], start, count)
    state.lengths.copy_(counts)


@torch.no_grad()
def extend(
    layer: "MultiscaleAttention", cache: AttentionCache, x: Tensor, counts: Tensor | None
) -> tuple[Tensor, Fused | None]:
    """Continue a filled cache by the tokens ``x``.

    Args:
        layer: The cache's layer.
        cache: Updated in place.
        x: ``[B, T, D]``, a row's real tokens at its front.
        counts: ``[B]``, real tokens of each row; None: all.

    Returns:
        The fused heads ``[B, T, D]`` before the output projection, and what fusion decided; neither
        can be differentiated.
    """
    state, length = cache.reserve(x, x.shape[1]), x.shape[1]
    if length == 1 and has_kernels(layer, x):
        return _step(layer, cache, state, x, counts)
    if counts is None:
        counts = torch.full_like(state.lengths, length)
    pieces = []
    for begin in range(0, length, PIECE):
        piece = x[:, begin : begin + PIECE]
        pieces.append(
            _extend(layer, cache, state, piece, (counts - begin).clamp(0, piece.shape[1]))
        )
    if len(pieces) == 1:
        return pieces[0]
    outputs, infos = zip(*pieces, strict=True)
    if infos[0] is None:
        return torch.cat(outputs, 1), None
    joined = [None if p[0] is None else torch.cat(p, 2) for p in zip(*infos, strict=True)]
    return torch.cat(outputs, 1), Fused(*joined)  # pyright: ignore[reportArgumentType]


def _extend(
    layer: "MultiscaleAttention",
    cache: AttentionCache,
    state: CacheState,
    x: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Fused | None]:
    spec, length = layer.spec, x.shape[1]
    progress = Progress.of(state.lengths, counts, spec.strides, length)
    scales = _pyramid(layer, state.taps[:, 0], x, progress)
    values = _pyramid(layer, state.taps[:, 1], layer.v_proj(x), progress)
    features = _features(layer, state, scales, progress)
    # Blocks of each scale that are complete at each new token, [S, B, T].
    tokens = progress.starts[0][:, None] + torch.arange(1, length + 1, device=x.device)
    complete = torch.stack([tokens // stride for stride in spec.strides])
    rings = zip(cache.parts(state.keys), cache.parts(state.values), strict=True)
    upsampled = []
    for s, (key_ring, value_ring) in enumerate(rings):
        fine = spec.queries == "fine" and s > 0
        start, count = progress.starts[s], progress.counts[s]
        write_ring(state.taps[:, 0, s], scales[s], start, count)
        write_ring(state.taps[:, 1, s], values[s], start, count)
        blocks = start[:, None] + torch.arange(scales[s].shape[1], device=x.device)
        q, k = layer.project_qk(s, features[0 if fine else s], features[s])
        table = layer.table(blocks)
        q = rotate(q, layer.query_table(s, tokens - 1) if fine else table, spec.backend)
        k = rotate(k, table, spec.backend)
        out = _attend(
            key_ring,
            value_ring,
            q.transpose(1, 2),
            k.transpose(1, 2),
            _heads(values[s], spec.num_heads),
            last=complete[s] - 1 if fine else blocks,
            start=start,
            count=count,
            window=spec.spans[s],
        )
        if not fine:
            ring = state.outputs[:, :, s, None]
            joined, own = torch.cat((ring, out), 2), out
            out = take_rows(joined, _inside(find_tokens(complete[s] - 1, start, ring), joined))
            write_ring(ring, own, start, count)
        upsampled.append(out)
    state.lengths += counts
    if layer.fusion is None:
        return upsampled[0].transpose(1, 2).flatten(2), None
    fused = layer.fusion.step(
        torch.stack(upsampled, 3),
        (complete > 0).permute(1, 2, 0)[:, None],
        x,
        _heads(values[0], spec.num_heads),
    )
    return fused.output.transpose(1, 2).flatten(2), fused


def has_kernels(layer: "MultiscaleAttention", x: Tensor) -> bool:
    """Whether kernels serve one new token (`maha_attn.ops.backend.use_triton`)."""
    spec, weight = layer.spec, layer.v_proj.weight
    limit = _kernel_limit(layer, x)
    return use_triton(spec.backend, x, weight, width=spec.head_dim, limit=limit)


def _kernel_limit(layer: "MultiscaleAttention", x: Tensor) -> str | None:
    """Why kernels cannot serve a step of this layer; None where they can."""
    spec, fusion = layer.spec, layer.fusion
    if spec.gating or spec.dilation:
        return "the decoding kernels have no gating and no dilation"
    if spec.num_scales > 1 and (limit := kernel_limit(spec.downsample)):
        return limit
    if torch.is_autocast_enabled(x.device.type):
        return "the decoding kernels don't run under autocast"
    modules = [layer.v_proj, *layer.q_proj, *layer.k_proj]
    modules = modules if fusion is None else modules + fusion.projections
    if all(is_plain(module) and module.weight.dtype == x.dtype for module in modules):
        return None
    return f"the decoding kernels need linear projections of {x.dtype}, without hooks or adapters"


def _step(
    layer: "MultiscaleAttention",
    cache: AttentionCache,
    state: CacheState,
    x: Tensor,
    counts: Tensor | None,
) -> tuple[Tensor, Fused]:
    """One new token by kernels; ``counts`` is 0 or 1."""
    from maha_attn.ops.triton.decode import decode

    spec, fusion = layer.spec, layer.fusion
    qk = [module for pair in zip(layer.q_proj, layer.k_proj, strict=True) for module in pair]
    gate = target = logits = log_gram = None
    if fusion is not None:
        gate, target = fusion.gate_proj, fusion.target_proj
        logits, log_gram = fusion.logits, fusion.log_gram
    fused, weights, residual, status = decode(
        x[:, 0],
        None if counts is None else counts > 0,
        state.lengths,
        state.taps,
        state.keys,
        state.values,
        state.outputs,
        layer.v_proj.weight,
        layer.v_proj.bias,
        None if target is None else target.weight,
        None if target is None else target.bias,
        None if gate is None else gate.weight,
        [module.weight for module in qk],
        [module.bias for module in qk if module.bias is not None],
        list(layer.pyramid.down),
        logits,
        log_gram,
        cache.sizes,
        spec.ratio,
        spec.queries == "fine",
        spec.rope_theta,
        "mean" if fusion is None else spec.fusion,
        spec.constraint,
        spec.target,
        spec.ridge,
        spec.sparsity,
        spec.temperature,
        fusion is not None and spec.fusion in ("convex", "nash"),
    )
    certificate = (residual[..., None], status[..., None]) if residual.numel() else (None, None)
    return fused[:, None], Fused(fused, weights[:, :, None], *certificate)


def _pyramid(
    layer: "MultiscaleAttention", rings: Tensor, x: Tensor, progress: Progress
) -> list[Tensor]:
    """New tokens of every scale, ``[B, most_s, D]``, of ``x`` and past ones ``[B, S, k, D]``."""
    spec, new = layer.spec, [x]
    taps = torch.arange(spec.taps, device=x.device)
    for s in range(spec.num_scales - 1):
        most = progress.most[s + 1]
        if most == 0:
            new.append(x[:, :0])
            continue
        ring = rings[:, s]
        blocks = progress.starts[s + 1][:, None] + torch.arange(most, device=x.device)
        position = spec.ratio * (blocks[..., None] + 1) - spec.taps + taps
        extended = torch.cat((ring, new[s]), 1)
        index = find_tokens(position.flatten(1), progress.starts[s], ring)
        windows = take_rows(extended, _inside(index, extended))
        windows = windows.unflatten(1, (most, spec.taps)).transpose(-1, -2)
        new.append(combine(windows, layer.pyramid.weight(s, x.dtype), spec.downsample))
    return new


def _features(
    layer: "MultiscaleAttention", state: CacheState, scales: list[Tensor], progress: Progress
) -> list[Tensor]:
    """What the new tokens' queries and keys are made of."""
    spec, pyramid, features = layer.spec, layer.pyramid, list(scales)
    if spec.gating:
        for s, (scale, coarser) in enumerate(pairwise(scales)):
            ring = state.taps[:, 0, s + 1]
            ends = torch.arange(1, scale.shape[1] + 1, device=scale.device)
            complete = (progress.starts[s][:, None] + ends) // spec.ratio
            known = torch.cat((ring, coarser), 1)
            index = find_tokens(complete - 1, progress.starts[s + 1], ring)
            gate = pyramid.gate(s, take_rows(known, _inside(index, known)))
            features[s] = torch.where(complete[..., None] > 0, gate, 1) * scale
    if spec.dilation:
        for s, gated in enumerate(features):
            ring, start = state.context[:, s], progress.starts[s]
            past = start[:, None] + torch.arange(1 - ring.shape[1], 0, device=gated.device)
            features[s] = dilated_convolution(
                gated,
                pyramid.dilated[s],
                dilation=spec.dilation,
                causal=True,
                context=take_rows(ring, past % ring.shape[1]),
            )
            write_ring(ring, gated, start, progress.counts[s])
    return features


def _attend(
    key_ring: Tensor,
    value_ring: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    last: Tensor,
    start: Tensor,
    count: Tensor,
    window: int | None,
) -> Tensor:
    """Add the new keys and values to the rings, and attend from ``q`` to what each query may see.

    Args:
        key_ring, value_ring: ``[B, H, P, K]``, changed in place.
        q: ``[B, H, T, K]``.
        k, v: ``[B, H, n, K]``, of which row ``b`` adds ``count[b]`` after its ``start[b]``.
        last: ``[B, T]``, the last key that each query sees; -1: none (the result is then finite and
            unused).
        start, count: ``[B]``.
        window: Tokens that a query sees; None: all.
    """
    new = k.shape[2]
    # The first of several queries sees tokens of the window that later ones overwrite.
    apart = q.shape[2] > 1 and window is not None
    keys, values, position = key_ring, value_ring, ring_positions(key_ring, start + count)
    if apart:
        keys, values = torch.cat((key_ring, k), 2), torch.cat((value_ring, v), 2)
        added = start[:, None] + torch.arange(new, device=q.device)
        position = torch.cat((ring_positions(key_ring, start), added), 1)
    write_ring(key_ring, k, start, count)
    write_ring(value_ring, v, start, count)
    if q.shape[2] == 0:
        return q
    distance = last[..., None] - position[:, None]
    visible = (position[:, None] >= 0) & (distance >= 0)
    if window is not None:
        visible = visible & (distance < window)
    visible = visible | ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None])


def _inside(index: Tensor, x: Tensor) -> Tensor:
    """Some token for what lies beyond the row's count, and is unused."""
    return index.clamp(max=x.shape[-2] - 1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, N, D]`` to ``[B, H, N, K]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
