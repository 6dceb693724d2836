"""Full attention twice: as fast as PyTorch has it, and with its ``N × N`` matrices formed.

MAHA's layer with one full scale (``full``) is the same function on MAHA's kernels, and decodes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_attn.baselines.interface import BaselineAttention, RotaryProjection, projection
from maha_attn.spec import AttentionSpec

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class SdpaAttention(BaselineAttention):
    """``softmax(QKᵀ/√K + mask) V`` by `scaled_dot_product_attention`, by cuDNN where it can."""

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
        return self.out_proj(self.mix(q, k, v, real).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """``[B, H, N, K]`` out of three of the same."""
        causal = self.spec.causal
        mask = None if causal or real is None else real[:, None, None]  # Else in the future.
        with sdpa_kernel(FASTEST_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def attention_flops(self, length: int) -> int:
        """``4·D`` per visible pair."""
        pairs = length * (length + 1) // 2 if self.spec.causal else length**2
        return 4 * self.spec.hidden_size * pairs


class MaterialisedAttention(SdpaAttention):
    """The same, one operator after the other, as the paper compares memory with.

    Own code: PyTorch's materialising path works in fp32 whatever the inputs, and transformers'
    eager attention keeps an fp32 copy of the weights; either would need more memory than necessary.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """As `SdpaAttention.mix`."""
        scores = (q * self.spec.head_dim**-0.5) @ k.transpose(-1, -2)
        if self.spec.causal:
            length = q.shape[2]
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        elif real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        return scores.softmax(-1) @ v

    def attention_flops(self, length: int) -> int:
        """``4·D·N²``: masked pairs are computed too."""
        return 4 * self.spec.hidden_size * length**2
