"""What every baseline shares: `MultiscaleAttention`'s interface around an attention from elsewhere.

A library's module is taken as it is, with three changes that give all of them the same backbone:
their query and key projections also rotate (`RotaryProjection`), since the backbone embeds no
positions; projections have biases only where the options say so; a missing output projection is
added. Letters: ``B`` rows, ``N`` tokens, ``D`` width, ``H`` heads, ``K = D/H``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maha_attn.baselines.registry import Attention
from maha_attn.layers.attention import FusionInfo
from maha_attn.layers.cache import AttentionCache
from maha_attn.layers.padding import check_tokens, to_front, to_places
from maha_attn.ops.rotary import rotate, sequence_table
from maha_attn.spec import AttentionSpec


class BaselineAttention(nn.Module):
    """An attention with the interface of `MultiscaleAttention` and no decoding cache.

    A subclass defines `attend`; where it holds parameters or buffers that are neither linear nor
    convolutional, `reset_parameters`; and where there is a closed form, `attention_flops`.
    """

    registered: Attention | None = None
    """What it can and cannot do; `build_attention` sets it."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        cache: AttentionCache | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, FusionInfo]:
        """Attend; as `MultiscaleAttention.forward`, with one scale of weight 1.

        Raises:
            TypeError, ValueError: As there; where a ``cache`` is given, padding to a bidirectional
                attention that would count it, or autocast to one that breaks under it.
        """
        check_tokens(x, padding_mask, self.spec.hidden_size)
        if cache is not None:
            raise ValueError(
                f"cache must be None: {type(self).__name__} has no decoding cache; use_cache=False"
            )
        if padding_mask is not None and bool(padding_mask.all()):
            padding_mask = None
        self._refuse(x, padding_mask)
        if padding_mask is None:
            y = self.attend(x, None)
        else:
            x, places = to_front(x, padding_mask)
            # A row of no token attends to its first place; the result is zeroed below.
            lengths = padding_mask.sum(1, keepdim=True).clamp(min=1)
            y = self.attend(x, torch.arange(x.shape[1], device=x.device) < lengths)
            y = to_places(y, places, padding_mask)
        if not return_info:
            return y
        ones = torch.ones(x.shape[0], self.spec.num_heads, x.shape[1], 1, device=x.device)
        return y, FusionInfo(ones, None, None)

    def _refuse(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Say no to what its registration excludes."""
        if self.registered is None:
            return
        counted = self.registered.padding == "counted" and not self.spec.causal
        if counted and padding_mask is not None:
            raise ValueError(
                f"padding_mask must mark every token: {type(self).__name__} would count padding as "
                "tokens; give it rows of one length"
            )
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and not self.registered.autocast:
            raise ValueError(
                f"autocast must be off: {type(self).__name__}'s library ({self.registered.source}) "
                "breaks under it; train in fp32, or convert the model: model.bfloat16()"
            )

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Attend to the real tokens.

        Args:
            x: ``[B, N, D]``, zero at padding.
            real: ``[B, N]`` bool, real tokens at the front of their row, at least one in each;
                None: all.

        Returns:
            ``[B, N, D]``; anything at padding.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initial values of what is neither linear nor convolutional."""

    def attention_flops(self, length: int) -> int | None:
        """FLOPs of a forward pass over one row beside its projections, in closed form."""

    def extra_repr(self) -> str:
        """The options, in ``print(layer)``."""
        return repr(self.spec)


class RotaryProjection(nn.Linear):
    """Queries or keys: ``x Wᵀ``, each head rotated by its token's position.

    Args:
        spec: ``hidden_size``, ``head_dim``, ``num_heads``, ``rope_theta``, ``bias``, ``backend``.
        num_heads: Heads to project to, if fewer than the options'.
        tokens_first: ``x`` is ``[N, B, D]``, not ``[B, N, D]``.
    """

    def __init__(
        self, spec: AttentionSpec, *, num_heads: int | None = None, tokens_first: bool = False
    ) -> None:
        width = (num_heads or spec.num_heads) * spec.head_dim
        super().__init__(spec.hidden_size, width, bias=spec.bias)
        self.spec, self.tokens_first = spec, tokens_first

    def forward(self, input: Tensor) -> Tensor:
        """Project and rotate."""
        y = super().forward(input.transpose(0, 1) if self.tokens_first else input)
        head_dim, theta = self.spec.head_dim, self.spec.rope_theta
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        table = sequence_table(y.shape[1], head_dim, theta, dtype, y.device)
        y = y.unflatten(-1, (-1, head_dim))
        y = rotate(y, table, self.spec.backend).flatten(2)
        return y.transpose(0, 1).contiguous() if self.tokens_first else y


def projection(spec: AttentionSpec) -> nn.Linear:
    """``D`` to ``D``, with a bias where the options say so."""
    return nn.Linear(spec.hidden_size, spec.hidden_size, bias=spec.bias)


def pad_to_multiple(x: Tensor, real: Tensor | None, multiple: int) -> tuple[Tensor, Tensor]:
    """Lengthen rows with padding to a multiple of ``multiple`` tokens."""
    if real is None:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    extra = -x.shape[1] % multiple
    return F.pad(x, (0, 0, 0, extra)), F.pad(real, (0, extra))
