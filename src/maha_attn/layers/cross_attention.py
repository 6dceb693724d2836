"""Attention of one sequence to another: what a decoder takes from its encoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """``softmax(Q Kᵀ/√K) V`` with ``Q`` of one sequence, ``K`` and ``V`` of another, the memory.

    The standard form (Vaswani et al., arXiv 1706.03762, §3.2), over every real token of the memory
    and without positions, which the memory's own layers have told it.

    Args:
        hidden_size: Width ``D`` of both sequences.
        num_heads: Heads ``H``.
        bias: Biases in the projections.

    Cost: ``4·D`` FLOPs a pair of tokens, ``2D²(2N + 2M)`` for the projections.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(4)
        )

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, M, K]`` of the memory ``[B, M, D]``, which stay the same."""
        return self._split(self.k_proj(memory)), self._split(self.v_proj(memory))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[B, N, D]``.
            keys, values: Of `project`.
            memory_mask: ``[B, M]`` bool, True at the memory's real tokens, of which every row has
                at least one.

        Returns:
            ``[B, N, D]``.
        """
        mask = None if memory_mask is None else memory_mask[:, None, None]
        output = F.scaled_dot_product_attention(
            self._split(self.q_proj(x)), keys, values, attn_mask=mask
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
