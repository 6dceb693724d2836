"""The transformer block around the attention: normalisation, residuals, feed-forward."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from maha_attn.layers.attention import FusionInfo, MultiscaleAttention
from maha_attn.layers.cache import AttentionCache
from maha_attn.layers.cross_attention import CrossAttention
from maha_attn.spec import AttentionSpec


class FeedForward(nn.Module):
    """``W_down(silu(W_gate x) ⊙ W_up x)`` (SwiGLU; Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feed every token of ``x`` ``[..., D]`` forward."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MahaBlock(nn.Module):
    """Attention and feed-forward with residual connections.

    ``norm="pre"``: ``x + A(norm(x))``, then ``x + F(norm(x))``. ``norm="post"``, as in the paper's
    published code: ``norm(x + A(x))``, then ``norm(x + F(x))``. The hybrid options, dilated
    convolution and cross-scale gating, act inside the pyramid: `AttentionSpec`.

    Args:
        spec: The attention's options.
        attention: A layer with `MultiscaleAttention`'s interface; None: that of ``spec``.
        intermediate_size: Width of the feed-forward.
        norm: ``pre`` or ``post``.
        norm_eps: Added to the mean square in the RMS normalisations.

    Raises:
        ValueError: ``norm`` or ``intermediate_size`` has no such value.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        attention: nn.Module | None = None,
        intermediate_size: int,
        norm: str = "pre",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, got {intermediate_size}")
        self.pre_norm = norm == "pre"
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=norm_eps)
        self.attention = MultiscaleAttention(spec) if attention is None else attention
        self.feed_forward_norm = nn.RMSNorm(spec.hidden_size, eps=norm_eps)
        self.feed_forward = FeedForward(spec.hidden_size, intermediate_size, bias=spec.bias)

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        cache: AttentionCache | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, FusionInfo]:
        """As `MultiscaleAttention.forward`; a padding token passes the feed-forward alone."""
        x, info = self._attend(x, padding_mask, cache, return_info)
        x = self._residual(x, self.feed_forward_norm, self.feed_forward)
        return x if info is None else (x, info)

    def _attend(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        cache: AttentionCache | None,
        return_info: bool,
    ) -> tuple[Tensor, FusionInfo | None]:
        info = None

        def attention(x: Tensor) -> Tensor:
            nonlocal info
            output = self.attention(x, padding_mask, cache=cache, return_info=return_info)
            if isinstance(output, tuple):
                output, info = output
            return output

        return self._residual(x, self.attention_norm, attention), info

    def _residual(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + part(norm(x)) if self.pre_norm else norm(x + part(x))


class MahaCrossBlock(MahaBlock):
    """`MahaBlock` with attention to another sequence between attention and feed-forward.

    Args:
        spec: Options of the attention within the sequence; heads and biases hold for both.
        options: As `MahaBlock`'s.
    """

    def __init__(self, spec: AttentionSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self.cross_attention_norm = nn.RMSNorm(spec.hidden_size, eps=self.attention_norm.eps)
        self.cross_attention = CrossAttention(spec.hidden_size, spec.num_heads, bias=spec.bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        *,
        cache: AttentionCache | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, FusionInfo]:
        """As `MahaBlock.forward`, with the memory as `CrossAttention.forward` takes it."""
        x, info = self._attend(x, padding_mask, cache, return_info)
        x = self._residual(
            x,
            self.cross_attention_norm,
            lambda x: self.cross_attention(x, keys, values, memory_mask),
        )
        x = self._residual(x, self.feed_forward_norm, self.feed_forward)
        return x if info is None else (x, info)
