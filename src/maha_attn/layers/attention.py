"""`MultiscaleAttention`: the whole layer, from tokens to tokens."""

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maha_attn.layers import decoding
from maha_attn.layers.cache import AttentionCache
from maha_attn.layers.fusion import ScaleFusion
from maha_attn.layers.padding import check_tokens, to_front, to_places
from maha_attn.layers.projection import autocast, project, under_autocast
from maha_attn.layers.pyramid import ScalePyramid, zero_beyond
from maha_attn.layers.stem import stem
from maha_attn.ops.backend import use_triton
from maha_attn.ops.fusion import Fused
from maha_attn.ops.multiscale_attention import multiscale_attention
from maha_attn.ops.rotary import rotary_table, sequence_table
from maha_attn.spec import AttentionSpec


class FusionInfo(NamedTuple):
    """What fusion decided, for every token of the input.

    Attributes:
        weights: ``[B, H, N, S]``, at least fp32; 0 where a scale is unavailable and at padding.
        residual: ``[B, H, N]``, the solver's KKT residual; None where nothing was solved.
        status: ``[B, H, N]``, `maha_attn.ops.qp.Status`; None where nothing was solved.
    """

    weights: Tensor
    residual: Tensor | None
    status: Tensor | None


_NUMBERS = count()
"""By which a cache knows its layer, in copies of the two as well."""


class _Continued(torch.autograd.Function):
    """What a cache was continued by, which has no derivative: said before a gradient is wrong."""

    @staticmethod
    def forward(ctx, output: Tensor, *_: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *_: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "tokens that continue a cache cannot be differentiated; train on whole sequences, or "
            "decode under torch.no_grad()"
        )


class MultiscaleAttention(nn.Module):
    """Multiscale aggregated hierarchical attention (arXiv 2512.14925; formulation §1 to §7).

    ``O_s = softmax(Q_s K_sᵀ/√K) V_s`` at every scale ``s`` of a learnable pyramid, then per token
    and head ``O* = Σ_s w_s u_s`` with ``w`` the solution of a small optimisation problem, then an
    output projection. With one scale it is plain attention (``preset="paper"``) or a sliding window
    (``preset="window"``).

    Args:
        spec: The options.

    Example:
        >>> import torch
        >>> from maha_attn import AttentionSpec, MultiscaleAttention
        >>> layer = MultiscaleAttention(AttentionSpec(hidden_size=64, num_heads=4, window=16))
        >>> y, info = layer(torch.randn(2, 100, 64), return_info=True)
        >>> y.shape, info.weights.shape
        (torch.Size([2, 100, 64]), torch.Size([2, 4, 100, 4]))

    Cost: attention FLOPs ``4·D`` per executed query-key pair, linear in ``N`` but for the coarsest
    scale (``(N/r^(S-1))²/2`` pairs); projections ``2D²N(2 Σ_s r^-s + 2)``.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec, self.number = spec, next(_NUMBERS)
        width = spec.hidden_size
        self.pyramid = ScalePyramid(spec)
        self.q_proj, self.k_proj = (
            nn.ModuleList(nn.Linear(width, width, bias=spec.bias) for _ in range(spec.num_scales))
            for _ in range(2)
        )
        self.v_proj = nn.Linear(width, width, bias=spec.bias)
        self.fusion = ScaleFusion(spec) if spec.num_scales > 1 else None
        self.out_proj = nn.Linear(width, width, bias=spec.bias)

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        cache: AttentionCache | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, FusionInfo]:
        """Attend.

        Args:
            x: ``[B, N, D]``, floating point, ``N ≥ 1``.
            padding_mask: ``[B, N]`` bool, True at real tokens, of ``x``'s tokens alone. The real
                tokens of a row are its sequence, wherever the padding stands.
            cache: An `AttentionCache` (causal only), the layer's own: an empty one is filled; a
                filled one is continued by the tokens of ``x``, which cannot be differentiated.
            return_info: Also return the `FusionInfo`.

        Returns:
            ``y`` ``[B, N, D]``, zero at padding; with ``return_info``, ``(y, info)``.

        Raises:
            TypeError: ``x`` has not the dtype of the layer (autocast aside), or ``padding_mask``
                is not boolean.
            ValueError: A shape is not as above, or ``cache`` is used in a bidirectional layer.
        """
        self._check(x, padding_mask, cache)
        x = autocast(x)
        lengths = places = None
        if padding_mask is not None:
            lengths = padding_mask.sum(1)
            x, places = to_front(x, padding_mask)
        if cache is None or cache.is_empty:
            output, info = self._full(x, lengths, cache, certified=return_info)
        else:
            output, info = decoding.extend(self, cache, x, lengths)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                output = _Continued.apply(output, x, self.v_proj.weight)
        if cache is not None:
            cache.seen += x.shape[1]
        y = self.out_proj(output)
        if padding_mask is not None:
            y = to_places(y, places, padding_mask)
            info = info if info is None or places is None else _unpack(info, places)
            info = info and _only_real(info, padding_mask)
        if not return_info:
            return y
        return y, FusionInfo(*self._complete(info, y))

    def _full(
        self,
        x: Tensor,
        lengths: Tensor | None,
        cache: AttentionCache | None = None,
        *,
        certified: bool,
    ) -> tuple[Tensor, Fused | None]:
        """The whole sequence at once; real tokens stand at the front of their rows."""
        spec = self.spec
        problem = [] if self.fusion is None else self.fusion.projections
        paired = cache is None and self._prefers_pairs(x)
        table = self.sequence_table(x, paired=paired)
        if spec.recompute and cache is None and torch.is_grad_enabled():
            base, *projected = project(x, [self.v_proj, *problem])
            values = base if lengths is None else zero_beyond(base, lengths)
            outputs = self._recomputed(x, values, table, lengths)
        else:
            # The finest scale's queries and keys join where they come from the tokens as they are.
            finest = [] if spec.gating or spec.dilation else [self.q_proj[0], self.k_proj[0]]
            (base, *projected), scales, values = stem(
                x, [self.v_proj, *problem], finest, self.pyramid, lengths, paired=paired
            )
            projected, finest = projected[: len(problem)], projected[len(problem) :]
            outputs = self._outputs(scales, values, finest, table, lengths, cache)
        if self.fusion is None:
            return outputs[0].transpose(1, 2).flatten(2), None
        heads = self.split(base).transpose(1, 2)
        fused = self.fusion(outputs, projected, heads, lengths, certified)
        return fused.output.transpose(1, 2).flatten(2), fused

    def _outputs(
        self,
        scales: list[Tensor],
        values: list[Tensor],
        finest: list[Tensor],
        table: Tensor,
        lengths: Tensor | None,
        cache: AttentionCache | None,
    ) -> list[Tensor]:
        """Every scale's attention, ``[B, H, N_s, K]``; fills ``cache`` where there is one.

        ``finest``: queries and keys of the finest scale, where known.
        """
        gated = self.pyramid.gated(scales)
        features = self.pyramid.convolved(gated, lengths)
        outputs, keys = self._attend(range(1), features, values, table, lengths, finest)
        # Apart and last, so that the backward pass has done with them before the finest's.
        coarse = self._attend(range(1, len(scales)), features, values, table, lengths)
        outputs, keys = outputs + coarse[0], keys + coarse[1]
        if cache is not None:
            x = scales[0]
            counts = x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64)
            counts = counts if lengths is None else lengths
            decoding.fill(
                cache, counts, scales=scales, values=values, gated=gated, keys=keys, outputs=outputs
            )
        return outputs

    def _recomputed(
        self, x: Tensor, base: Tensor, table: Tensor, lengths: Tensor | None
    ) -> list[Tensor]:
        """`_outputs`, keeping nothing of the coarse scales but their outputs.

        The finest scale comes last: the backward pass lets go of it before the others are rebuilt.
        """

        def coarse(x: Tensor, base: Tensor) -> list[Tensor]:
            scales, values = self.pyramid.scales([x, base], lengths)
            features = self.pyramid.features(scales, lengths)
            return self._attend(range(1, len(scales)), features, values, table, lengths)[0]

        rebuilt = checkpoint(coarse, x, base, use_reentrant=False, preserve_rng_state=False)
        features = [x]
        if self.spec.gating or self.spec.dilation:
            (scales,) = self.pyramid.scales([x], lengths)
            features = self.pyramid.features(scales, lengths)
        outputs, _ = self._attend(range(1), features, [base], table, lengths)
        return [*outputs, *rebuilt]  # pyright: ignore[reportGeneralTypeIssues]

    def _attend(
        self,
        chosen: range,
        features: list[Tensor],
        values: list[Tensor],
        table: Tensor,
        lengths: Tensor | None,
        finest: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and rotated keys of the ``chosen`` scales, of every scale's features and values.

        ``table``: rotary, of the layer's tokens; ``finest``: queries and keys of the finest scale,
        where they are known already, in the table's layout.
        """
        spec, paired = self.spec, table.is_complex()
        if not chosen:
            return [], []
        queries, keys, tables = [], [], []
        for s in chosen:
            fine = spec.queries == "fine" and s > 0
            if s == 0 and finest:
                q, k = map(self.split, finest)
            else:
                q, k = self.project_qk(s, features[0 if fine else s], features[s], paired=paired)
            queries.append(q.transpose(1, 2))
            keys.append(k.transpose(1, 2))
            tables.append(self.sequence_table(features[0], s, paired=paired) if fine else table)
        masked = [self.pyramid.key_lengths(lengths, s) for s in chosen]
        return multiscale_attention(
            queries,
            keys,
            [self.split(values[s]).transpose(1, 2) for s in chosen],
            query_tables=tables,
            key_table=table,
            windows=[spec.spans[s] for s in chosen],
            strides=[spec.strides[s] if spec.queries == "fine" else 1 for s in chosen],
            causal=spec.causal,
            lengths=[ends for ends in masked if ends is not None],
            backend=spec.backend,
        )

    def _prefers_pairs(self, x: Tensor) -> bool:
        """Whether heads are to be paired: kernels, caches and compiled passes are half-split."""
        by_kernels = use_triton(self.spec.backend, x, width=self.spec.head_dim)
        return not by_kernels and not torch.compiler.is_compiling()

    def project_qk(
        self, s: int, queries: Tensor, keys: Tensor, *, paired: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of scale ``s`` out of features ``[B, N, D]``, not yet rotated.

        Returns:
            ``[B, N, H, K]`` each, half-split or ``paired`` (`maha_attn.ops.rotary`).
        """
        q_proj, k_proj = self.q_proj[s], self.k_proj[s]
        head_dim = self.spec.head_dim if paired else None
        if queries is keys:
            q, k = project(queries, heads=[q_proj, k_proj], paired=head_dim)
        else:
            (q,) = project(queries, heads=[q_proj], paired=head_dim)
            (k,) = project(keys, heads=[k_proj], paired=head_dim)
        return self.split(q), self.split(k)

    def sequence_table(self, x: Tensor, s: int = 0, *, paired: bool = False) -> Tensor:
        """Rotary table of all tokens of ``x`` ``[B, N, D]``, of fine queries at scale ``s``."""
        spec, dtype = self.spec, self._angles_dtype()
        options = {"stride": spec.strides[s], "paired": paired}
        return sequence_table(
            x.shape[1], spec.head_dim, spec.rope_theta, dtype, x.device, **options
        )

    def table(self, positions: Tensor) -> Tensor:
        """Rotary table of positions in tokens of a scale; fp32 unless the layer is fp64."""
        return rotary_table(
            positions, self.spec.head_dim, self.spec.rope_theta, self._angles_dtype()
        )

    def query_table(self, s: int, tokens: Tensor) -> Tensor:
        """Rotary table of fine queries at scale ``s``.

        Token ``t`` stands at ``(t+1)/r^s - 1``: the last token of a block where the block stands.
        """
        return self.table((tokens + 1).to(self._angles_dtype()) / self.spec.strides[s] - 1)

    def _angles_dtype(self) -> torch.dtype:
        return torch.promote_types(self.v_proj.weight.dtype, torch.float32)

    def split(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, H, K]``."""
        return x.unflatten(-1, (self.spec.num_heads, self.spec.head_dim))

    def _complete(
        self, fused: Fused | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weights for all ``S`` scales and every token, also where the input has fewer scales."""
        batch, length = y.shape[:2]
        shape = (batch, self.spec.num_heads, length)
        if fused is None:
            return torch.ones(*shape, 1, device=y.device), None, None
        weights = fused.weights.expand(*shape, -1)
        weights = F.pad(weights, (0, self.spec.num_scales - weights.shape[-1]))
        residual = None if fused.residual is None else fused.residual.expand(shape)
        return weights, residual, None if fused.status is None else fused.status.expand(shape)

    def _check(self, x: Tensor, padding_mask: Tensor | None, cache: AttentionCache | None) -> None:
        check_tokens(x, padding_mask, self.spec.hidden_size)
        dtype = self.v_proj.weight.dtype
        if x.dtype != dtype and dtype.is_floating_point and not under_autocast(x):
            raise TypeError(
                f"x must have the layer's dtype {dtype}, got {x.dtype}; convert x or the layer "
                "with .to(dtype), or use torch.autocast"
            )
        if cache is not None:
            if not self.spec.causal:
                raise ValueError(
                    "cache needs a causal layer: a bidirectional one sees later tokens"
                )
            cache.check(self.spec, self.number, x)

    def extra_repr(self) -> str:
        """The options, in ``print(layer)``."""
        return repr(self.spec)


def _unpack(fused: Fused, places: Tensor) -> Fused:
    """Bring per-token results ``[B, H, N, …]`` back to where the tokens stood."""

    def move(x: Tensor) -> Tensor:
        x = x.expand(*x.shape[:2], places.shape[1], *x.shape[3:])
        return torch.take_along_dim(x, _per_token(places, x), 2)

    return _each(fused, move)


def _only_real(fused: Fused, padding_mask: Tensor) -> Fused:
    """Per-token results, 0 at padding."""
    return _each(fused, lambda x: torch.where(_per_token(padding_mask, x), x, 0))


def _per_token(x: Tensor, like: Tensor) -> Tensor:
    """``[B, N]`` as it broadcasts with ``like`` ``[B, H, N, …]``."""
    return x.reshape(x.shape[0], 1, x.shape[1], *(1,) * (like.dim() - 3))


def _each(fused: Fused, function: Callable[[Tensor], Tensor]) -> Fused:
    weights, *certificate = (x if x is None else function(x) for x in fused[1:])
    assert weights is not None
    return Fused(fused.output, weights, *certificate)
