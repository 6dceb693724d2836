"""Fusion: per token and head, weigh the scales' outputs (paper IV-C, formulation §4).

Letters: ``u_s`` the upsampled output of scale ``s``, ``U = (u_0 … u_{S-1})``, ``G = UUᵀ/√K`` their
Gram matrix, ``y`` the target, ``a`` the prior, ``ρ`` ridge, ``λ`` sparsity, ``τ`` temperature.
Inside, tokens stand before heads, ``[B, N, H, …]``, as attention and projections leave them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.ops.backend import use_triton
from maha_attn.ops.pyramid import availability
from maha_attn.ops.qp import solve_qp

_TILE = 1024
"""Tokens of a batch that a CPU fuses together: their rows stay in its cache."""


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """What all fusions of a layer have in common.

    Attributes:
        method: What the weights of a token and head are:

            - ``mean``: equal over the available scales;
            - ``static``, ``gate``: softmax of the logits;
            - ``convex`` (Eq. 7): ``min ½wᵀMw - (b + a - λ)ᵀw + τ Σ w log w`` with
              ``M = γG + ρI``, ``b = Uy/√K``, over ``constraint``;
            - ``nash`` (Eq. 8): the equilibrium of ``c_s(w) = ½‖u_s - Σ_k w_k u_k‖²/√K + λw_s +
              ½ρw_s²`` over the box, which solves ``M = G + ρI``, ``q = diag(G) - λ``.
        ridge, sparsity, temperature: ``ρ``, ``λ`` and ``τ``.
        constraint: The set of ``convex``: ``simplex`` or ``capped``.
        ratio: ``r``; scale ``s`` has stride ``r^s``.
        causal: Upsampling and availability as in formulation §3.
        fine: Every token queried every scale: nothing to upsample.
        per_sequence: Average ``G``, ``b`` and the logits over each row's tokens: one weight vector
            per row and head.
    """

    method: str
    ridge: float
    sparsity: float
    temperature: float
    constraint: str
    ratio: int
    causal: bool
    fine: bool
    per_sequence: bool


class Fused(NamedTuple):
    """What fusion returns.

    Attributes:
        output: ``O* = Σ_s w_s u_s``, ``[B, H, N, K]`` in the dtype of the outputs.
        weights: ``[B, H, N, S]`` (or one for all tokens, ``[B, H, 1, S]``), at least fp32.
        residual, status: The solver's certificate per problem; None where nothing was solved.
    """

    output: Tensor
    weights: Tensor
    residual: Tensor | None
    status: Tensor | None


def fuse(
    outputs: Sequence[Tensor],
    options: FusionOptions,
    *,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    certified: bool = True,
    backend: str = "auto",
) -> Fused:
    """Upsample every scale's output, choose its weights, combine.

    Args:
        outputs: Per scale ``[B, H, N_s, K]``, finest first, or ``[B, H, N, K]`` each where
            ``options.fine``.
        options: The layer's.
        logits: The logits, or ``convex``'s prior ``a``; broadcastable to ``[B, H, N, S]``.
        target: ``y`` of ``convex``, ``[B, H, N, K]``; None: ``b = 0``.
        gram_scale: ``γ ≥ 0`` of ``convex``, ``[H]``; None: 1.
        lengths: ``[B]`` real tokens of each row; used by ``options.per_sequence`` alone.
        certified: Return ``residual`` and ``status``; without, their time is saved.
        backend: ``auto``, ``torch`` or ``triton`` (`maha_attn.ops.backend.use_triton`); the kernel
            serves ratios that are powers of 2 and weights per token.

    Numerics: Gram matrices, problems and weights in fp32 at least, whatever the inputs. No scale is
    upsampled in full.
    """
    first, ratio, causal = outputs[0], options.ratio, options.causal
    if use_triton(backend, *outputs, width=first.shape[-1], limit=_kernel_limit(options)):
        from maha_attn.ops.triton import fusion as kernels

        return kernels.fuse(
            outputs,
            options,
            logits=logits,
            target=target,
            gram_scale=gram_scale,
            certified=certified,
        )
    strides = tuple(ratio**s for s in range(len(outputs)))
    available = availability(strides, first.shape[2], causal=causal, device=first.device)
    tokens = [u.transpose(1, 2) for u in outputs]
    with _full_precision(first):
        if options.fine or len(outputs) == 1:
            scales = _Stacked(torch.stack(tokens, 3))
        else:
            scales = _Tiles(tokens, strides, causal=causal)
        shares = _token_shares(lengths, first) if options.per_sequence else None
        available = available[None, None]
        fused = _fuse(
            scales, available, options, logits, target, gram_scale, shares, certified=certified
        )
    return fused._replace(output=fused.output.to(first.dtype))


def _kernel_limit(options: FusionOptions) -> str | None:
    """Why the fusion kernel cannot serve these options; None where it can."""
    if options.ratio & (options.ratio - 1):
        return f"fusion's kernel needs a ratio that is a power of 2, got {options.ratio}"
    return "fusion's kernel has no granularity='sequence'" if options.per_sequence else None


def fuse_stacked(
    stacked: Tensor,
    available: Tensor,
    options: FusionOptions,
    *,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
) -> Fused:
    """`fuse` for outputs that are upsampled already, as in decoding: each token has its weights.

    Args:
        stacked: ``U``, ``[B, H, N, S, K]``.
        available: bool, broadcastable to ``[B, H, N, S]``.
        options, logits, target, gram_scale: As in `fuse`.
    """
    available = available[(None,) * (4 - available.dim())]
    with _full_precision(stacked):
        scales = _Stacked(stacked.transpose(1, 2))
        fused = _fuse(scales, available, options, logits, target, gram_scale)
    return fused._replace(output=fused.output.to(stacked.dtype))


class _Stacked:
    """``U`` in full, ``[B, N, H, S, K]``."""

    def __init__(self, stacked: Tensor) -> None:
        self.u = _at_least_fp32(stacked)
        self.shape, self.width, self.dtype = stacked.shape[:-1], stacked.shape[-1], self.u.dtype

    def products(self, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``UUᵀ`` ``[B, N, H, S, S]`` and ``Uy`` ``[B, N, H, S]``."""
        against = None if target is None else (self.u @ target.to(self.u.dtype)[..., None])[..., 0]
        return self.u @ self.u.mT, against

    def combine(self, weights: Tensor) -> Tensor:
        """``Σ_s w_s u_s``, ``[B, N, H, K]``."""
        return (weights.to(self.u.dtype)[..., None, :] @ self.u)[..., 0, :]


class _Tiles:
    """``U`` tile by tile of tokens, so that a CPU's cache holds what is made of it.

    Causal, token ``t`` takes block ``⌊(t+1)/r^s⌋ - 1``. With one token put before the sequence, and
    one zero block before every scale's, it takes block ``⌊t/r^s⌋``: the digits of ``t`` in base
    ``r`` without the last ``s``. Hence the tokens of a tile are ``[B, C, r, …, r, H, K]``, ``C``
    coarsest blocks and ``S - 1`` digits, and the blocks of scale ``s`` are broadcast to them along
    the last ``s`` digits.
    """

    def __init__(self, outputs: Sequence[Tensor], strides: Sequence[int], *, causal: bool) -> None:
        first = outputs[0]
        batch, length, heads, self.width = first.shape
        self.shape = (batch, length, heads, len(outputs))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.strides, self.before = strides, int(causal)
        positions, in_cache = length + self.before, first.device.type == "cpu"
        in_cache = in_cache and not torch.compiler.is_compiling()
        num_tiles = max(round(batch * positions / _TILE), 1) if in_cache else 1
        self.size = -(-positions // (num_tiles * strides[-1])) * strides[-1]
        scales = (self._tiles(u, stride) for u, stride in zip(outputs, strides, strict=True))
        self.tiles = list(zip(*scales, strict=True))

    def _tiles(self, x: Tensor, stride: int = 1) -> list[Tensor]:
        """``[B, N_s, H, C]`` in tiles; what lies before and after the sequence is zero."""
        before, size, positions = self.before, self.size // stride, x.shape[1] + self.before
        sizes = [min(size, positions - start) for start in range(0, positions, size)]
        after = -sizes[-1] % (self.strides[-1] // stride)
        num_tiles = len(sizes)
        sizes[0] -= before
        digits = [self.strides[1] if stride < coarser else 1 for coarser in self.strides[:0:-1]]
        tiles = []
        for i, tile in enumerate(x.split(sizes, 1)):
            ends = (before if i == 0 else 0, after if i == num_tiles - 1 else 0)
            tile = F.pad(tile, (0, 0, 0, 0, *ends)) if any(ends) else tile
            tiles.append(tile.to(self.dtype).unflatten(1, (-1, *digits)))
        return tiles

    def _sequence(self, tiles: list[Tensor], dim: int) -> Tensor:
        """The tokens of the sequence, out of those of all tiles along ``dim``."""
        last = len(tiles) - 1
        ends = self.before + self.shape[1] - last * self.size
        tiles[last] = tiles[last].narrow(dim, 0, ends)
        tiles[0] = tiles[0].narrow(dim, self.before, tiles[0].shape[dim] - self.before)
        return torch.cat(tiles, dim)

    def products(self, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `_Stacked.products`; of two scales, at the resolution of the finer one."""
        scales, entries = range(self.shape[-1]), []
        targets = [()] * len(self.tiles) if target is None else zip(self._tiles(target))
        for tile, y in zip(self.tiles, targets, strict=True):
            upper = [[torch.linalg.vecdot(u, v) for v in tile[i:]] for i, u in enumerate(tile)]
            dots = [upper[min(i, j)][abs(i - j)] for i in scales for j in scales]
            dots += [torch.linalg.vecdot(*y, u) for u in tile if y]
            dots = torch.stack([dot.expand(tile[0].shape[:-1]) for dot in dots])
            entries.append(dots.unflatten(0, (-1, len(scales))).flatten(3, -2))
        # The solver wants its problems contiguous, one matrix entry after another.
        found = self._sequence(entries, 3).permute(2, 3, 4, 0, 1)
        return found[..., : len(scales), :], None if target is None else found[..., -1, :]

    def combine(self, weights: Tensor) -> Tensor:
        """As `_Stacked.combine`."""
        fused = []
        for (finest, *others), weight in zip(self.tiles, self._tiles(weights), strict=True):
            total = finest * weight[..., :1]
            for s, u in enumerate(others, 1):
                total.addcmul_(u, weight[..., s, None])
            fused.append(total.flatten(1, -3))
        return self._sequence(fused, 1)


def _fuse(
    scales: _Stacked | _Tiles,
    available: Tensor,
    options: FusionOptions,
    logits: Tensor | None,
    target: Tensor | None,
    gram_scale: Tensor | None,
    shares: Tensor | None = None,
    *,
    certified: bool = True,
) -> Fused:
    """`fuse` of any representation; ``shares`` ``[B, N, 1, 1]`` average over each row's tokens."""
    method, sparsity, residual, status = options.method, options.sparsity, None, None
    available = available.transpose(1, 2)
    logits = None if logits is None else logits.transpose(1, 2)
    if shares is not None:
        available = available[:, :1]  # Bidirectional: every scale is available everywhere.
    if method in ("convex", "nash"):
        y = target.transpose(1, 2) if method == "convex" and target is not None else None
        gram, against = scales.products(y)
        scale = scales.width**-0.5
        if method == "nash":
            linear = gram.diagonal(dim1=-2, dim2=-1) * scale - sparsity
        else:
            linear = gram.new_full((), -sparsity) if against is None else against * scale - sparsity
            linear = linear if logits is None else linear + logits.to(gram.dtype)
            if gram_scale is not None:
                scale = scale * gram_scale.to(gram.dtype)[:, None, None]
        matrix = gram * scale
        matrix.diagonal(dim1=-2, dim2=-1).add_(options.ridge)
        solution = solve_qp(
            _mean(matrix, None if shares is None else shares[..., None]),
            _mean(linear.expand(scales.shape), shares),
            constraint="box" if method == "nash" else options.constraint,
            temperature=0.0 if method == "nash" else options.temperature,
            available=available,
            certified=certified,
        )
        weights = solution.weights
        if certified:
            residual, status = (t.transpose(1, 2) for t in (solution.residual, solution.status))
    else:
        if logits is None:
            logits = torch.zeros(1, 1, 1, 1, dtype=scales.dtype, device=available.device)
        logits = _at_least_fp32(_mean(logits, shares))
        weights = logits.masked_fill(~available, -torch.inf).softmax(-1)
        weights = weights.expand(scales.shape[0], -1, scales.shape[2], -1)
    output = scales.combine(weights.expand(scales.shape))
    return Fused(output.transpose(1, 2), weights.transpose(1, 2), residual, status)


def _full_precision(like: Tensor) -> AbstractContextManager:
    """No autocast, on devices that have it (``meta`` has none)."""
    device = like.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _token_shares(lengths: Tensor | None, like: Tensor) -> Tensor:
    """``[B, N, 1, 1]``: 1/length for a row's real tokens, 0 for its padding."""
    length = like.shape[2]
    if lengths is None:
        return torch.full((1, length, 1, 1), 1 / length, device=like.device)
    real = torch.arange(length, device=like.device) < lengths[:, None]
    return (real / lengths.clamp(min=1)[:, None])[..., None, None]


def _mean(x: Tensor, shares: Tensor | None) -> Tensor:
    """Mean over a row's tokens (dimension 1); ``x`` itself where each has its own weights."""
    if shares is None or x.shape[1] == 1:
        return x
    return (x * shares.to(x.dtype)).sum(1, keepdim=True)
