"""Full attention that forms its ``N × N`` matrices, as the paper's comparison of memory does.

Own code: PyTorch's materialising path works in fp32 whatever the inputs, and transformers' eager
attention keeps an fp32 copy of the weights; either would need more memory than necessary.
"""

import torch
from torch import Tensor

from maha_attn.baselines.interface import BaselineAttention, RotaryProjection, projection
from maha_attn.spec import AttentionSpec


class MaterialisedAttention(BaselineAttention):
    """``softmax(QKᵀ/√K + mask) V``, one operator after the other."""

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        self.q_proj, self.k_proj = RotaryProjection(spec), RotaryProjection(spec)
        self.v_proj, self.out_proj = projection(spec), projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        heads = (self.spec.num_heads, self.spec.head_dim)
        q, k, v = (
            project(x).unflatten(-1, heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q * self.spec.head_dim**-0.5) @ k.transpose(-1, -2)
        if self.spec.causal:
            length = x.shape[1]
            future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        elif real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def attention_flops(self, length: int) -> int:
        """``4·D·N²``: masked pairs are computed too."""
        return 4 * self.spec.hidden_size * length**2
