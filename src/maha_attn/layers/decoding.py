"""Filling a cache from a full pass, and continuing a cached sequence by the work of its new tokens.

A scale does work only for the blocks that the new tokens complete. ``start`` and ``count`` of a row
are in tokens of the scale at hand: what it had, and what the new tokens add.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.layers.cache import AttentionCache, ScaleState, last_tokens, take_rows, write
from maha_attn.ops.fusion import Fused
from maha_attn.ops.pyramid import combine, dilated_convolution
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
        most: Per scale the most that any row adds, on the host.
    """

    starts: Tensor
    counts: Tensor
    most: list[int]

    @classmethod
    def of(
        cls, lengths: list[int], counts: list[int], strides: tuple[int, ...], device: torch.device
    ) -> "Progress":
        """Rows of ``lengths`` tokens get ``counts`` more."""
        before = torch.tensor(lengths)
        after = before + torch.tensor(counts)
        per_scale = torch.tensor(strides)[:, None]
        starts = before // per_scale
        added = after // per_scale - starts
        return cls(starts.to(device), added.to(device), added.amax(1).tolist())


@torch.no_grad()
def fill(
    cache: AttentionCache,
    counts: list[int],
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
        counts: Real tokens of each row; they stand at the front.
        scales, values, gated: ``X_s``, ``V_s`` and the inputs of the dilated convolution,
            ``[B, N_s, D]``, of the scales that the input has.
        keys: Rotated keys, ``[B, H, N_s, K]``.
        outputs: ``O_s``, ``[B, H, N_s, K]`` (coarse queries).
    """
    spec, x = cache.spec, scales[0]
    cache.initialise(x)
    progress = Progress.of(cache.lengths, counts, spec.strides, x.device)
    for s, state in enumerate(cache.scales[: len(scales)]):
        added = progress.counts[s]
        state.tokens = last_tokens(state.tokens, scales[s], added)
        state.base_values = last_tokens(state.base_values, values[s], added)
        state.context = last_tokens(state.context, gated[s], added)
        heads = _heads(values[s], spec.num_heads)
        if spec.spans[s] is None:
            state.keys, state.values = keys[s].contiguous(), heads.contiguous()
        else:
            state.keys = last_tokens(state.keys, keys[s], added)
            state.values = last_tokens(state.values, heads, added)
        if spec.queries == "coarse":
            state.output = last_tokens(state.output, outputs[s], added)
    cache.lengths = list(counts)


def extend(
    layer: "MultiscaleAttention", cache: AttentionCache, x: Tensor, counts: list[int]
) -> tuple[Tensor, Fused | None]:
    """Continue a filled cache by the tokens ``x``.

    Args:
        layer: The cache's layer.
        cache: Updated in place.
        x: ``[B, T, D]``, a row's real tokens at its front.
        counts: Real tokens of each row.

    Returns:
        The fused heads ``[B, T, D]`` before the output projection, and what fusion decided.
    """
    pieces = []
    for begin in range(0, x.shape[1], PIECE):
        piece = x[:, begin : begin + PIECE]
        pieces.append(
            _extend(layer, cache, piece, [min(max(c - begin, 0), piece.shape[1]) for c in counts])
        )
    if len(pieces) == 1:
        return pieces[0]
    outputs, infos = zip(*pieces, strict=True)
    if infos[0] is None:
        return torch.cat(outputs, 1), None
    joined = [None if p[0] is None else torch.cat(p, 2) for p in zip(*infos, strict=True)]
    return torch.cat(outputs, 1), Fused(*joined)  # pyright: ignore[reportArgumentType]


def _extend(
    layer: "MultiscaleAttention", cache: AttentionCache, x: Tensor, counts: list[int]
) -> tuple[Tensor, Fused | None]:
    spec, length = layer.spec, x.shape[1]
    progress = Progress.of(cache.lengths, counts, spec.strides, x.device)
    scales = _pyramid(layer, cache, "tokens", x, progress)
    values = _pyramid(layer, cache, "base_values", layer.v_proj(x), progress)
    features = _features(layer, cache, scales, progress)
    for s, state in enumerate(cache.scales):
        state.tokens = last_tokens(state.tokens, scales[s], progress.counts[s])
        state.base_values = last_tokens(state.base_values, values[s], progress.counts[s])
    # Blocks of each scale that are complete at each new token, [S, B, T].
    tokens = progress.starts[0][:, None] + torch.arange(1, length + 1, device=x.device)
    complete = torch.stack([tokens // stride for stride in spec.strides])
    upsampled = []
    for s, state in enumerate(cache.scales):
        fine = spec.queries == "fine" and s > 0
        start = progress.starts[s]
        blocks = start[:, None] + torch.arange(scales[s].shape[1], device=x.device)
        q, k = layer.project_qk(s, features[0 if fine else s], features[s])
        table = layer.table(blocks)
        q = rotate(q, layer.query_table(s, tokens - 1) if fine else table, spec.backend)
        k = rotate(k, table, spec.backend)
        out = _attend(
            state,
            q.transpose(1, 2),
            k.transpose(1, 2),
            _heads(values[s], spec.num_heads),
            last=complete[s] - 1 if fine else blocks,
            start=start,
            count=progress.counts[s],
            window=spec.spans[s],
        )
        if not fine:
            extended = torch.cat((state.output, out), 2)
            out = take_rows(
                extended, (complete[s] - start[:, None]).clamp(max=extended.shape[2] - 1)
            )
            state.output = take_rows(extended, progress.counts[s][:, None])
        upsampled.append(out)
    cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
    if layer.fusion is None:
        return upsampled[0].transpose(1, 2).flatten(2), None
    fused = layer.fusion.step(
        torch.stack(upsampled, 3),
        (complete > 0).permute(1, 2, 0)[:, None],
        x,
        _heads(values[0], spec.num_heads),
    )
    return fused.output.transpose(1, 2).flatten(2), fused


def _pyramid(
    layer: "MultiscaleAttention", cache: AttentionCache, past: str, x: Tensor, progress: Progress
) -> list[Tensor]:
    """New tokens of every scale, ``[B, most_s, D]``, of ``x`` and each scale's ``past`` ones."""
    spec, new = layer.spec, [x]
    taps = torch.arange(spec.taps, device=x.device)
    for s in range(spec.num_scales - 1):
        most = progress.most[s + 1]
        if most == 0:
            new.append(x[:, :0])
            continue
        extended = torch.cat((getattr(cache.scales[s], past), new[s]), 1)
        # The first new coarse token's first tap, counted from the first past token.
        first = spec.ratio * progress.starts[s + 1] - progress.starts[s] + spec.ratio - 1
        index = (
            first[:, None, None] + spec.ratio * torch.arange(most, device=x.device)[:, None] + taps
        )
        windows = take_rows(extended, index.flatten(1).clamp(max=extended.shape[1] - 1))
        windows = windows.unflatten(1, (most, spec.taps)).transpose(-1, -2)
        new.append(combine(windows, layer.pyramid.weight(s, x.dtype), spec.downsample))
    return new


def _features(
    layer: "MultiscaleAttention", cache: AttentionCache, scales: list[Tensor], progress: Progress
) -> list[Tensor]:
    """What the new tokens' queries and keys are made of."""
    spec, pyramid, features = layer.spec, layer.pyramid, list(scales)
    if spec.gating:
        for s, (scale, coarser) in enumerate(pairwise(scales)):
            known = torch.cat((cache.scales[s + 1].tokens[:, -1:], coarser), 1)
            ends = progress.starts[s][:, None] + torch.arange(
                1, scale.shape[1] + 1, device=scale.device
            )
            complete = ends // spec.ratio
            index = (complete - progress.starts[s + 1][:, None]).clamp(max=known.shape[1] - 1)
            gate = pyramid.gate(s, take_rows(known, index))
            features[s] = torch.where(complete[..., None] > 0, gate, 1) * scale
    if spec.dilation:
        for s, state in enumerate(cache.scales):
            gated = features[s]
            features[s] = dilated_convolution(
                gated,
                pyramid.dilated[s],
                dilation=spec.dilation,
                causal=True,
                context=state.context,
            )
            state.context = last_tokens(state.context, gated, progress.counts[s])
    return features


def _attend(
    state: ScaleState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    last: Tensor,
    start: Tensor,
    count: Tensor,
    window: int | None,
) -> Tensor:
    """Add the new keys and values to ``state``, and attend from ``q`` to those each query may see.

    Args:
        q: ``[B, H, T, K]``.
        k, v: ``[B, H, n, K]``, of which row ``b`` adds ``count[b]`` after its ``start[b]``.
        last: ``[B, T]``, the last key that each query sees; -1: none (the result is then finite and
            unused).
    """
    new = k.shape[2]
    if window is None:
        needed = int(start.amax()) + new
        state.keys, state.values = (
            write(past, t, start, needed) for past, t in ((state.keys, k), (state.values, v))
        )
        keys, values = state.keys, state.values
        position = torch.arange(keys.shape[2], device=q.device)[None]
    else:
        keys, values = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
        state.keys = last_tokens(state.keys, k, count)
        state.values = last_tokens(state.values, v, count)
        position = start[:, None] - window + torch.arange(keys.shape[2], device=q.device)
    if q.shape[2] == 0:
        return q
    distance = last[..., None] - position[:, None]
    visible = (position[:, None] >= 0) & (distance >= 0)
    if window is not None:
        visible = visible & (distance < window)
    visible = visible | ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None])


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, N, D]`` to ``[B, H, N, K]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
