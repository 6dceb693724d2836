"""The decoding cache of one layer: what the next tokens need of the past (formulation §7).

Everything is a ring: token ``p`` of a scale lies in slot ``p mod P``, where ``P`` is what must be
remembered. A full scale is a ring that is long enough never to come round. So rows of any length
stand side by side, a step writes one slot in place, and where a row is, is known on the device
alone: a step neither waits for the host nor moves memory, and can be captured in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from maha_attn.layers.pyramid import DILATED_TAPS
from maha_attn.spec import AttentionSpec


@dataclass
class CacheState:
    """The tensors of a cache, rows first. ``P`` counts the slots of all scales, one after another.

    A step that is repeated after ``lengths`` was put back gives the same result: a ring has one
    slot more than what a token needs of the past.

    Attributes:
        lengths: ``[B]`` int64, real tokens seen by each row.
        taps: ``[B, 2, S, k, D]``, the last tokens of ``X_s`` and ``V_s``, of which the next coarse
            token is made, and which gate the finer scale.
        context: ``[B, S, c, D]``, the last inputs of the dilated convolution.
        keys, values: ``[B, H, P, K]``, keys rotated.
        outputs: ``[B, H, S, K]``, ``O_s`` of the last complete block (coarse queries).
    """

    lengths: Tensor
    taps: Tensor
    context: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "CacheState":
        """The state of ``function`` of every tensor."""
        return CacheState(*(function(tensor) for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state."""
        return [getattr(self, field.name) for field in fields(self)]


class AttentionCache:
    """The state of one causal `MultiscaleAttention` between calls.

    Pass an empty one to the layer with a prompt, then the same one with each next chunk of tokens,
    of any length: the outputs equal those of one pass over everything, up to rounding.

    Args:
        spec: The layer's options.
        capacity: Tokens to hold room for from the start. It doubles when it is exceeded; a CUDA
            graph needs all its room beforehand.

    Attributes:
        spec, capacity: As above.
        seen: Slots seen, padding included: no row is longer.
        state: The tensors; None before the first pass.
        owner: The number of the layer that filled it; None before that.
    """

    def __init__(self, spec: AttentionSpec, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0 tokens, got {capacity}")
        self.spec, self.capacity = spec, capacity
        self.reset()

    def reset(self) -> None:
        """Forget everything, and give up its memory."""
        self.seen = 0
        self.state: CacheState | None = None
        self.owner: int | None = None

    @property
    def is_empty(self) -> bool:
        """Has no token been seen?"""
        return self.seen == 0

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first pass."""
        return 0 if self.state is None else self.state.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, unused room of full scales included."""
        return 0 if self.state is None else sum(t.nbytes for t in self.state.tensors())

    @property
    def sizes(self) -> list[int]:
        """Slots of each scale: its window, or all the blocks there is room for.

        Room comes in multiples of 16, for which kernels are compiled once.
        """
        rooms = [-(-max(self.capacity // stride, 1) // 16) * 16 for stride in self.spec.strides]
        spans = self.spec.spans
        return [room if w is None else min(w, room) for w, room in zip(spans, rooms, strict=True)]

    def get_seq_length(self) -> int:
        """Slots seen so far, padding included."""
        return self.seen

    def ready(self) -> CacheState:
        """The state of a cache that has one."""
        if self.state is None:
            raise ValueError("cache is empty: pass it to the layer with a prompt first")
        return self.state

    def parts(self, memory: Tensor) -> tuple[Tensor, ...]:
        """``state.keys`` or ``state.values`` cut into the scales' rings ``[B, H, P_s, K]``."""
        return memory.split(self.sizes, 2)

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index`` ``[B']``, in that order; rows may repeat."""
        if self.state is not None:
            self.state = self.state.map(lambda t: t.index_select(0, index.to(t.device)))

    def reorder(self, index: Tensor) -> None:
        """Beam search: row ``b`` continues what row ``index[b]`` was."""
        self.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times in a row."""
        self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def check(self, spec: AttentionSpec, number: int, x: Tensor) -> None:
        """Raise `ValueError` where the layer of this number can't continue it by ``x``."""
        if spec != self.spec:
            raise ValueError(f"cache belongs to another layer: made for {self.spec}, got {spec}")
        if self.owner not in (None, number):
            raise ValueError("cache belongs to another layer: make an AttentionCache for each")
        self.owner = number
        if self.state is not None and x.shape[0] != self.batch_size:
            raise ValueError(
                f"x must have {self.batch_size} rows as the cache has, got {x.shape[0]}; "
                "use cache.repeat or cache.select to change them"
            )

    def reserve(self, like: Tensor, new: int) -> CacheState:
        """Make room for ``new`` more tokens of rows like those of ``like`` ``[B, …]``."""
        needed, old_sizes = self.seen + new, self.sizes
        grows = needed > self.capacity
        if grows:
            self.capacity = max(needed, 2 * self.capacity)
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            if self.state is None:
                self.state = self._allocate(like)
            elif grows and self.sizes != old_sizes:
                self._move(self.state, old_sizes)
        return self.state

    def _allocate(self, like: Tensor) -> CacheState:
        spec, batch = self.spec, like.shape[0]
        reach = (DILATED_TAPS - 1) * spec.dilation
        heads, width = (batch, spec.num_heads), spec.head_dim
        return CacheState(
            lengths=torch.zeros(batch, dtype=torch.int64, device=like.device),
            taps=like.new_zeros(batch, 2, spec.num_scales, spec.taps, spec.hidden_size),
            context=like.new_zeros(
                batch, spec.num_scales, reach + 1 if reach else 0, spec.hidden_size
            ),
            keys=like.new_zeros(*heads, sum(self.sizes), width),
            values=like.new_zeros(*heads, sum(self.sizes), width),
            outputs=like.new_zeros(*heads, spec.num_scales, width),
        )

    def _move(self, state: CacheState, old_sizes: list[int]) -> None:
        """Give every scale its new size. A ring that grows has not come round yet."""
        for name in ("keys", "values"):
            old = getattr(state, name)
            new = old.new_zeros(*old.shape[:2], sum(self.sizes), old.shape[3])
            for target, source in zip(self.parts(new), old.split(old_sizes, 2), strict=True):
                target[:, :, : source.shape[2]] = source
            setattr(state, name, new)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, ..., index[b, i], :]`` for ``x`` ``[B, ..., n, C]`` and ``index`` ``[B, m]``."""
    index = index.reshape(index.shape[0], *(1,) * (x.dim() - 3), index.shape[1], 1)
    return torch.take_along_dim(x, index, -2)


def ring_positions(ring: Tensor, end: Tensor) -> Tensor:
    """The token in each slot of ``ring`` ``[B, ..., P, C]`` after ``end`` ``[B]`` tokens.

    Returns:
        ``[B, P]``, negative where there is none.
    """
    last = end[:, None] - 1
    size = ring.shape[-2]
    return last - (last - torch.arange(size, device=ring.device)) % size


def find_tokens(position: Tensor, start: Tensor, ring: Tensor) -> Tensor:
    """Where tokens lie in ``ring`` followed by the new tokens from ``start`` on.

    Args:
        position: ``[B, m]``. One before the first token finds a slot that is still zero.
        start: ``[B]``.
        ring: ``[B, ..., P, C]``.
    """
    size, start = ring.shape[-2], start[:, None]
    return torch.where(position < start, position % size, size + position - start)


def write_ring(ring: Tensor, new: Tensor, start: Tensor, count: Tensor) -> None:
    """Write the first ``count`` of the tokens ``new``, which follow ``start`` others.

    Args:
        ring: ``[B, ..., P, C]``, changed in place.
        new: ``[B, ..., n, C]``.
        start, count: ``[B]``.
    """
    kept = min(ring.shape[-2], new.shape[-2])
    if kept == 0:
        return
    index = count[:, None] - kept + torch.arange(kept, device=ring.device)
    slots = (start[:, None] + index) % ring.shape[-2]
    # A row of fewer new tokens writes back what lies in the slots that it has nothing for.
    real = (index >= 0).reshape(-1, *(1,) * (ring.dim() - 3), kept, 1)
    tokens = torch.where(real, take_rows(new, index.clamp(min=0)), take_rows(ring, slots))
    slots = slots.reshape(real.shape).expand_as(tokens)
    ring.scatter_(-2, slots, tokens.to(ring.dtype))
