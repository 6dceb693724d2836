"""The learnable side of fusion: logits or prior, target, and the Gram matrix's scale."""

import torch
from torch import Tensor, nn

from maha_attn.layers.projection import project
from maha_attn.ops.fusion import Fused, FusionOptions, fuse, fuse_stacked
from maha_attn.spec import AttentionSpec


def fusion_options(spec: AttentionSpec) -> FusionOptions:
    """``spec`` as `maha_attn.ops.fusion.fuse` takes it."""
    return FusionOptions(
        method=spec.fusion,
        ridge=spec.ridge,
        sparsity=spec.sparsity,
        temperature=spec.temperature,
        constraint=spec.constraint,
        ratio=spec.ratio,
        causal=spec.causal,
        fine=spec.queries == "fine",
        per_sequence=spec.granularity == "sequence",
    )


class ScaleFusion(nn.Module):
    """Parameters of ``spec.fusion`` and the problem that they pose for each token.

    A new layer favours the finest scale by ``spec.prior_init`` in its logits or prior: it begins
    as a sliding window and lets the coarse scales earn their weight (formulation §9).
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec, self.options = spec, fusion_options(spec)
        heads, scales, width = spec.num_heads, spec.num_scales, spec.hidden_size
        kind = {"static": "static", "gate": "gate", "convex": spec.prior}.get(spec.fusion, "none")
        self.logits = nn.Parameter(torch.empty(heads, scales)) if kind != "none" else None
        self.gate_proj = nn.Linear(width, heads * scales, bias=False) if kind == "gate" else None
        convex = spec.fusion == "convex"
        self.target_proj = (
            nn.Linear(width, width, bias=spec.bias) if convex and spec.target == "learned" else None
        )
        self.log_gram = nn.Parameter(torch.empty(heads)) if convex and spec.learned_gram else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Logits 0 but the finest's, the gate's slope 0, ``γ = 1``."""
        if self.logits is not None:
            nn.init.zeros_(self.logits)
            nn.init.constant_(self.logits[:, :1], self.spec.prior_init)
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
        if self.log_gram is not None:
            nn.init.zeros_(self.log_gram)

    def forward(
        self,
        outputs: list[Tensor],
        projected: list[Tensor],
        values: Tensor,
        lengths: Tensor | None = None,
        certified: bool = False,
    ) -> Fused:
        """Fuse the outputs of the scales that the input has.

        Args:
            outputs: Finest first, as `maha_attn.ops.fusion.fuse` takes them.
            projected: The layer's input, mapped by each of `projections`.
            values: The tokens' base values ``V_0``, ``[B, H, N, K]``.
            lengths: Real tokens of each row, ``[B]``.
            certified: Return the solver's certificate.
        """
        return fuse(
            outputs,
            self.options,
            lengths=lengths,
            certified=certified,
            backend=self.spec.backend,
            **self._tensors(projected, values, outputs[0], len(outputs)),
        )

    def step(self, stacked: Tensor, available: Tensor, x: Tensor, values: Tensor) -> Fused:
        """`forward` for outputs ``[B, H, N, S, K]`` that are upsampled already (decoding)."""
        projected = project(x, self.projections)
        tensors = self._tensors(projected, values, stacked[..., 0, :], stacked.shape[3])
        return fuse_stacked(stacked, available, self.options, **tensors)

    @property
    def projections(self) -> list[nn.Linear]:
        """What the problem takes from the tokens: the gate and the target, where there are any."""
        return [module for module in (self.gate_proj, self.target_proj) if module is not None]

    def _tensors(
        self, projected: list[Tensor], values: Tensor, finest: Tensor, num_scales: int
    ) -> dict[str, Tensor | None]:
        """The tensors of the tokens' problems, as `fuse` names them."""
        spec, parts = self.spec, iter(projected)
        logits = None
        if self.logits is not None:
            logits = self.logits[None, :, None]
            if self.gate_proj is not None:
                logits = logits + next(parts).unflatten(-1, self.logits.shape).transpose(1, 2)
            logits = logits[..., :num_scales]
        target = None
        if spec.fusion == "convex":
            if self.target_proj is not None:
                target = next(parts).unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
            else:
                target = {"value": values, "finest": finest}.get(spec.target)
        gram_scale = None if self.log_gram is None else self.log_gram.exp()
        return {"logits": logits, "target": target, "gram_scale": gram_scale}
