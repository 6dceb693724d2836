"""Reformer (Kitaev et al., arXiv 2001.04451): transformers' `LSHSelfAttention`."""

import logging

from torch import Tensor
from transformers.models.reformer import modeling_reformer
from transformers.models.reformer.configuration_reformer import ReformerConfig

from maha_attn.baselines.interface import (
    BaselineAttention,
    RotaryProjection,
    pad_to_multiple,
    projection,
)
from maha_attn.spec import AttentionSpec

NUM_HASHES = 4
"""Of the published enwik8 model; the paper's quality at 4 to 8 rounds is near full attention's."""

# It remarks on every number of buckets that it chooses.
logging.getLogger(modeling_reformer.__name__).setLevel(logging.ERROR)


class Reformer(BaselineAttention):
    """Tokens, sorted by a hash of their keys, see their chunk of ``w/2`` tokens and the one before.

    Queries and keys are one projection. Rows are padded to whole chunks, as Reformer's own model
    does in evaluation (in training it refuses them); up to one chunk attention is full.
    """

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        self.chunk = max(spec.window // 2, 2)
        config = ReformerConfig(
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            attention_head_size=spec.head_dim,
            lsh_attn_chunk_length=self.chunk,
            lsh_attention_probs_dropout_prob=0.0,
            num_hashes=NUM_HASHES,
            is_decoder=spec.causal,
            max_position_embeddings=max_length,
        )
        self.library = modeling_reformer.LSHSelfAttention(config)
        self.library.query_key = RotaryProjection(spec)
        self.library.value = projection(spec)
        self.out_proj = projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        length = x.shape[1]
        if length > self.chunk and (length % self.chunk or real is not None):
            x, real = pad_to_multiple(x, real, self.chunk)
        self.library.num_buckets = None  # Of this length, not of the first one seen.
        y = self.library(x, attention_mask=real).hidden_states
        return self.out_proj(y[:, :length])

    def reset_parameters(self) -> None:
        """The library's mask values, which no checkpoint holds."""
        self.library.self_mask_value_float16.fill_(-1e3)
        self.library.self_mask_value_float32.fill_(-1e5)
        self.library.mask_value_float16.fill_(-1e4)
        self.library.mask_value_float32.fill_(-1e9)

    def attention_flops(self, length: int) -> int:
        """Per hash ``4·D`` for each of two chunks of keys, and the rotations into ``b`` buckets.

        ``2·D·N·b/2`` for one number of buckets (the library factorises a large one: a sum then).
        """
        if length <= self.chunk:
            return 4 * self.spec.hidden_size * length**2
        length += -length % self.chunk
        self.library._set_num_buckets(length)
        buckets = self.library.num_buckets
        rotations = sum(buckets) if isinstance(buckets, list) else buckets
        return NUM_HASHES * self.spec.hidden_size * length * (8 * self.chunk + rotations)
