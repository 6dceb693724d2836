"""Linformer (Wang et al., arXiv 2006.04768): the linformer package's attention."""

from linformer import LinformerSelfAttention
from torch import Tensor, nn

from maha_attn.baselines.interface import BaselineAttention, RotaryProjection, projection
from maha_attn.spec import AttentionSpec


class Linformer(BaselineAttention):
    """Keys and values are projected along the sequence onto ``k = 256`` each; then full attention.

    The projections ``[max_length, k]`` are parameters; shorter rows use their first lines. Padding
    is zero and has no bias, so it adds nothing to a projected key or value.
    """

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        if spec.bias:
            raise ValueError("bias must be False for linformer: padding would be no longer zero")
        self.library = LinformerSelfAttention(spec.hidden_size, max_length, heads=spec.num_heads)
        self.library.to_q, self.library.to_k = RotaryProjection(spec), RotaryProjection(spec)
        self.library.to_out = projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        if x.shape[1] > self.library.seq_len:
            raise ValueError(
                f"x must have at most {self.library.seq_len} tokens (max_position_embeddings), for "
                f"which this linformer layer was made; got {x.shape[1]}"
            )
        return self.library(x)

    def reset_parameters(self) -> None:
        """The library's values of the projections along the sequence."""
        for weight in (self.library.proj_k, self.library.proj_v):
            nn.init.uniform_(weight, -(self.library.k**-0.5), self.library.k**-0.5)

    def attention_flops(self, length: int) -> int:
        """``8·D·N·k``: two projections along the sequence, QKᵀ, and weights times values."""
        return 8 * self.spec.hidden_size * length * self.library.k
