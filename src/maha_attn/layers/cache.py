"""The decoding cache of one layer: what the next tokens need of the past (formulation §7).

Rows of a batch may have different lengths, and so complete blocks at different steps. Everything is
therefore kept aligned to each row's own end: "the last t tokens" of a row, not slots of the batch.
Only the keys and values of a full scale grow; they stand at their own position from the left.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.layers.pyramid import DILATED_TAPS
from maha_attn.spec import AttentionSpec


@dataclass
class ScaleState:
    """One scale's share of the cache; a part that the layer's options don't need has width 0.

    Attributes:
        tokens, base_values: ``[B, t, D]``, the last tokens of ``X_s`` and ``V_s``: the taps of the
            next coarse token that are known already, and the token that gates the finer scale.
        context: ``[B, (k-1)·dilation, D]``, the last inputs of the dilated convolution.
        keys, values: ``[B, H, P, K]``, rotated keys and values: the last ``w`` (windowed), or all
            with room to grow (full).
        output: ``[B, H, 1, K]``, ``O_s`` of the last complete block.
    """

    tokens: Tensor
    base_values: Tensor
    context: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``function`` of it."""
        for field in fields(self):
            setattr(self, field.name, function(getattr(self, field.name)))

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the state."""
        return (getattr(self, field.name) for field in fields(self))


class AttentionCache:
    """The state of one causal `MultiscaleAttention` between calls.

    Pass an empty one to the layer with a prompt, then the same one with each next chunk of tokens,
    of any length: the outputs equal those of one pass over everything, up to rounding.

    Args:
        spec: The layer's options.

    Attributes:
        spec: The layer's options.
        lengths: Real tokens seen by each row, on the host: they decide which blocks complete, and a
            step must not wait for the device to know.
        seen: Slots seen, padding included.
        scales: One `ScaleState` per scale; empty before the first pass.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lengths: list[int] = []
        self.seen = 0
        self.scales: list[ScaleState] = []

    @property
    def is_empty(self) -> bool:
        """Has no token been seen?"""
        return not self.scales

    @property
    def nbytes(self) -> int:
        """Bytes held, unused room of growing buffers included."""
        return sum(t.nbytes for state in self.scales for t in state.tensors())

    def get_seq_length(self) -> int:
        """Slots seen so far, padding included."""
        return self.seen

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index`` ``[B']``, in that order; rows may repeat."""
        for state in self.scales:
            state.map(lambda t: t.index_select(0, index.to(t.device)))
        self.lengths = [self.lengths[row] for row in index.tolist()] if self.scales else []

    def reorder(self, index: Tensor) -> None:
        """Beam search: row ``b`` continues what row ``index[b]`` was."""
        self.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times in a row."""
        self.select(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def check(self, spec: AttentionSpec, x: Tensor) -> None:
        """Raise `ValueError` where a layer of ``spec`` can't continue this cache by ``x``."""
        if spec != self.spec:
            raise ValueError(f"cache belongs to another layer: made for {self.spec}, got {spec}")
        if not self.is_empty and x.shape[0] != len(self.lengths):
            raise ValueError(
                f"x must have {len(self.lengths)} rows as the cache has, got {x.shape[0]}; "
                "use cache.repeat or cache.select to change them"
            )

    def initialise(self, like: Tensor) -> None:
        """Empty states for the rows of ``like`` ``[B, N, D]``."""
        spec, batch = self.spec, like.shape[0]
        self.lengths = [0] * batch
        for s, span in enumerate(spec.spans):
            taps = spec.taps - 1 if s + 1 < spec.num_scales else 0
            known = max(taps, int(spec.gating and s > 0))
            heads = (batch, spec.num_heads)
            self.scales.append(
                ScaleState(
                    tokens=like.new_zeros(batch, known, spec.hidden_size),
                    base_values=like.new_zeros(batch, taps, spec.hidden_size),
                    context=like.new_zeros(
                        batch, (DILATED_TAPS - 1) * spec.dilation, spec.hidden_size
                    ),
                    keys=like.new_zeros(*heads, span or 0, spec.head_dim),
                    values=like.new_zeros(*heads, span or 0, spec.head_dim),
                    output=like.new_zeros(*heads, 1, spec.head_dim),
                )
            )


def last_tokens(past: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    """The last ``t`` tokens of each row once ``counts`` new ones have joined the ``t`` past ones.

    Args:
        past: ``[B, ..., t, C]``.
        new: ``[B, ..., n, C]``.
        counts: ``[B]``, how many of the ``n`` are the row's.

    Returns:
        ``[B, ..., t, C]``.
    """
    keep = past.shape[-2]
    if keep == 0 or new.shape[-2] == 0:
        return past
    return take_rows(
        torch.cat((past, new), -2), counts[:, None] + torch.arange(keep, device=past.device)
    )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, ..., index[b, i], :]`` for ``x`` ``[B, ..., n, C]`` and ``index`` ``[B, m]``."""
    index = index.reshape(index.shape[0], *(1,) * (x.dim() - 3), index.shape[1], 1)
    return torch.take_along_dim(x, index, -2)


def write(buffer: Tensor, new: Tensor, starts: Tensor, needed: int) -> Tensor:
    """Write ``new`` ``[B, H, n, K]`` at each row's ``starts`` ``[B]``, growing to hold ``needed``.

    Room doubles, so that a token's cost does not depend on how many came before. Entries of ``new``
    beyond a row's own count land beyond its length: they are overwritten before they are seen.
    """
    room = buffer.shape[2]
    if needed > room:
        buffer = F.pad(buffer, (0, 0, 0, max(needed, 2 * room) - room))
    index = starts[:, None] + torch.arange(new.shape[2], device=new.device)
    return buffer.scatter(2, index[:, None, :, None].expand_as(new), new)
