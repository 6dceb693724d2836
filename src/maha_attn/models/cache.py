"""The decoding cache of a whole model, in the form that ``generate`` handles."""

from typing import TYPE_CHECKING

import torch
from transformers import Cache

from maha_attn.layers.cache import AttentionCache

if TYPE_CHECKING:
    from maha_attn.models.configuration import MahaConfig


class MahaCache(Cache):
    """One :class:`~maha_attn.AttentionCache` per layer (formulation §7).

    A forward pass that is given one continues it, whatever the chunk's length. What a layer keeps
    (rings of keys, tokens of unfinished blocks) cannot be taken back, so the cache cannot be
    cropped, and it grows with the full scales, so it is not compiled.

    Args:
        config: Of the model that will fill the cache.
        capacity: Tokens to hold room for from the start.

    Raises:
        ValueError: A layer's attention has no decoding cache.
    """

    layers: list[AttentionCache]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: "MahaConfig", capacity: int = 0) -> None:
        if names := sorted(set(config.uncached_layer_types)):
            raise ValueError(
                f"use_cache must be False: {', '.join(names)} (layer_types) has no decoding cache"
            )
        specs = [config.attention_spec(i) for i in range(config.num_hidden_layers)]
        super().__init__(layers=[AttentionCache(spec, capacity) for spec in specs])  # pyright: ignore[reportArgumentType]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.layers[layer_idx].get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row ``i`` continue row ``beam_idx[i]``."""
        for layer in self.layers:
            layer.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy each row ``repeats`` times, copies side by side."""
        for layer in self.layers:
            layer.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        for layer in self.layers:
            layer.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise ValueError(
            "a MahaCache cannot give up tokens again, so it supports neither assisted decoding nor "
            "rollback; start from a copy (copy.deepcopy) taken at the shorter length"
        )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return self.layers[0].batch_size or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a forward pass has filled the cache."""
        return not self.layers[0].is_empty

    @property
    def is_compileable(self) -> bool:
        """False."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False
