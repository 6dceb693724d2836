"""The learnable pyramid: one set of downsampling operators for features and values alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maha_attn.ops import pyramid as ops
from maha_attn.spec import AttentionSpec

DILATED_TAPS = 3
"""Kernel of the dilated convolution (paper IV-D)."""


class ScalePyramid(nn.Module):
    """``X_s = D_s(X_{s-1})`` and ``V_s = D_s(V_{s-1})`` (paper Eq. 5), with the hybrid options.

    With gating, scale ``s - 1`` is multiplied by ``σ(W_g X_s)``, upsampled; with a dilation, each
    scale then goes through ``ReLU(DilatedConv(·))`` (paper IV-D). Both act on what queries and keys
    are made of, not on the values and not on the pyramid itself.

    Initial values: the block mean for the convolutions, so that a new pyramid keeps information;
    gates at ``σ(W·X) ≈ ½ + …`` (default linear initialisation); the dilated convolution starts as
    the identity before its ReLU.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        width, steps = spec.hidden_size, spec.num_scales - 1
        shape = {"conv": (spec.taps, width), "dense_conv": (width, width, spec.taps)}.get(
            spec.downsample
        )
        self.down = nn.ParameterList(
            nn.Parameter(torch.empty(shape or ())) for _ in range(steps if shape else 0)
        )
        self.gates = nn.ModuleList(
            nn.Linear(width, width, bias=spec.bias) for _ in range(steps if spec.gating else 0)
        )
        self.dilated = nn.ParameterList(
            nn.Parameter(torch.empty(DILATED_TAPS, width))
            for _ in range(spec.num_scales if spec.dilation else 0)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the convolutions' initial values; the gates are ordinary linear layers."""
        ratio = self.spec.ratio
        for weight in self.down:
            nn.init.zeros_(weight)
            if weight.dim() == 2:
                nn.init.constant_(weight[-ratio:], 1 / ratio)
            else:
                for tap in range(weight.shape[2] - ratio, weight.shape[2]):
                    nn.init.eye_(weight[..., tap]).mul_(1 / ratio)
        for weight in self.dilated:
            nn.init.zeros_(weight)
            nn.init.ones_(weight[-1] if self.spec.causal else weight[DILATED_TAPS // 2])

    def scales(self, streams: Sequence[Tensor], lengths: Tensor | None) -> list[list[Tensor]]:
        """``[X_0, X_1, …]`` of each stream, as many scales as it has (``[B, N_s, D]``)."""
        spec = self.spec
        return ops.build(
            streams,
            list(self.down),
            steps=spec.num_scales - 1,
            ratio=spec.ratio,
            method=spec.downsample,
            causal=spec.causal,
            lengths=lengths,
            backend=spec.backend,
        )

    def features(self, scales: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
        """What queries and keys of every scale are made of."""
        return self.convolved(self.gated(scales), lengths)

    def gated(self, scales: list[Tensor]) -> list[Tensor]:
        """``σ(W_g X_{s+1}) ⊙ X_s`` (or ``X_s`` without gating), the coarsest as it is."""
        spec, gated = self.spec, list(scales)
        if not spec.gating:
            return gated
        for s, coarser in enumerate(scales[1:]):
            length = scales[s].shape[1]
            gate = ops.upsample(
                self.gate(s, coarser), stride=spec.ratio, length=length, causal=spec.causal
            )
            if spec.causal:  # Before the first complete block the gate is unavailable: 1.
                none = spec.ratio - 1
                gate = torch.cat((torch.ones_like(gate[:, :none]), gate[:, none:]), 1)
            gated[s] = gate * scales[s]
        return gated

    def convolved(self, gated: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
        """``C_s = ReLU(DilatedConv(·))`` of every scale, or the scales without a dilation."""
        spec = self.spec
        if not spec.dilation:
            return gated
        features = [
            ops.dilated_convolution(x, weight, dilation=spec.dilation, causal=spec.causal)
            for x, weight in zip(gated, self.dilated, strict=False)
        ]
        if lengths is None or spec.causal:
            return features
        return [zero_beyond(x, self.lengths(lengths, s)) for s, x in enumerate(features)]

    def gate(self, step: int, coarser: Tensor) -> Tensor:
        """``σ(W_g X_{step+1})``, the gate of scale ``step``."""
        return self.gates[step](coarser).sigmoid()

    def weight(self, step: int, dtype: torch.dtype) -> Tensor | None:
        """The operator from scale ``step`` to ``step + 1``, in the tokens' ``dtype`` (autocast)."""
        return self.down[step].to(dtype) if len(self.down) else None

    def lengths(self, lengths: Tensor, scale: int) -> Tensor:
        """Real tokens of each row at ``scale``, ``[B]``."""
        stride = self.spec.strides[scale]
        return lengths // stride if self.spec.causal else -(-lengths // stride)

    def key_lengths(self, lengths: Tensor | None, scale: int) -> Tensor | None:
        """`lengths` where keys must be masked: causal padding lies in the future of every token."""
        return None if lengths is None or self.spec.causal else self.lengths(lengths, scale)


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero the tokens of ``x`` ``[B, N, D]`` beyond each row's length."""
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(real[..., None], x, 0)
