"""Native sparse attention (Yuan et al., arXiv 2502.11089) on the kernels of flash-linear-attention.

Own assembly: the library's layer takes its window from flash-attn, which few machines have; here it
is MAHA's windowed attention, the mathematics being the same.
"""

from fla.ops.nsa import parallel_nsa  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from maha_attn.baselines.interface import BaselineAttention, RotaryProjection, projection
from maha_attn.ops.scale_attention import scale_attention
from maha_attn.spec import AttentionSpec

GROUP, BLOCK, SELECTED, WINDOW = 16, 64, 16, 512
"""Query heads to a key head (the kernels' least); the paper's blocks and window."""


class NativeSparseAttention(BaselineAttention):
    """Gated sum of attention to block means, to the 16 best blocks of 64, and to a window of 512.

    One head of keys and values serves 16 heads of queries, as the kernels require.
    """

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        if spec.num_heads % GROUP:
            raise ValueError(
                f"num_heads must be a multiple of {GROUP} for native_sparse, got {spec.num_heads}"
            )
        num_key_heads = spec.num_heads // GROUP
        self.q_proj = RotaryProjection(spec)
        self.k_proj = RotaryProjection(spec, num_heads=num_key_heads)
        self.v_proj = nn.Linear(spec.hidden_size, num_key_heads * spec.head_dim, bias=spec.bias)
        self.gate_proj = nn.Linear(spec.hidden_size, 3 * spec.num_heads, bias=False)
        self.out_proj = projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`; padding lies in the future."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.spec.head_dim)).contiguous()
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.gate_proj(x).unflatten(-1, (-1, 3)).sigmoid()
        return self.out_proj(native_sparse(q, k, v, gates, self.spec.backend).flatten(2))


def native_sparse(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, backend: str = "auto") -> Tensor:
    """Attention to block means, to the best blocks and to a window, summed by ``gates``.

    Args:
        q: ``[B, N, H, K]``.
        k, v: ``[B, N, H/16, K]``.
        gates: ``[B, N, H, 3]``.
        backend: Of the window.

    Returns:
        ``[B, N, H, K]``.
    """
    blocks, selected, window = gates.unbind(-1)
    y = parallel_nsa(q, k, v, blocks, selected, block_counts=SELECTED, block_size=BLOCK)
    q, k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (q, k, v))
    near = scale_attention(q, k, v, window=WINDOW, backend=backend)
    return y + near.transpose(1, 2) * window[..., None]
