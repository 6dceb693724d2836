"""Longformer (Beltagy et al., arXiv 2004.05150): transformers' `LongformerSelfAttention`."""

from torch import Tensor
from transformers.models.longformer.configuration_longformer import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from maha_attn.baselines.interface import (
    BaselineAttention,
    RotaryProjection,
    pad_to_multiple,
    projection,
)
from maha_attn.spec import AttentionSpec


class Longformer(BaselineAttention):
    """A sliding window ``|i-j| ≤ w/2``, computed in overlapping chunks of ``w`` tokens.

    No token of the backbone is global, so the projections of global tokens are left out. Rows are
    padded to a multiple of the window, as Longformer's own model does.
    """

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        self.window = 2 * (spec.window // 2)
        if self.window == 0:
            raise ValueError(f"window must be at least 2 for longformer, got {spec.window}")
        config = LongformerConfig(
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            attention_window=[self.window],
            attention_probs_dropout_prob=0.0,
        )
        self.library = LongformerSelfAttention(config, layer_id=0)
        self.library.query = RotaryProjection(spec, tokens_first=True)
        self.library.key = RotaryProjection(spec, tokens_first=True)
        self.library.value = projection(spec)
        for name in ("query_global", "key_global", "value_global"):
            setattr(self.library, name, None)
        self.out_proj = projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        length = x.shape[1]
        x, real = pad_to_multiple(x, real, self.window)
        (y,) = self.library(
            x,
            attention_mask=(~real).to(x.dtype),  # Whatever is not 0 is masked.
            is_index_masked=~real,
            is_index_global_attn=None,
            is_global_attn=False,
        )
        return self.out_proj(y[:, :length])

    def attention_flops(self, length: int) -> int:
        """``4·D`` per visible pair."""
        reach = min(self.window // 2, length - 1)
        pairs = length * (2 * reach + 1) - reach * (reach + 1)
        return 4 * self.spec.hidden_size * pairs
