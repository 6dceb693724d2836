"""Fusion: per token and head, weigh the scales' outputs (paper IV-C, formulation §4).

Letters: ``u_s`` the upsampled output of scale ``s``, ``U = (u_0 … u_{S-1})``, ``G = UUᵀ/√K`` their
Gram matrix, ``y`` the target, ``a`` the prior, ``ρ`` ridge, ``λ`` sparsity, ``τ`` temperature.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.ops.backend import use_triton
from maha_attn.ops.pyramid import availability
from maha_attn.ops.qp import solve_qp


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
    *,
    strides: Sequence[int],
    causal: bool,
    method: str,
    fine: bool = False,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
    ridge: float = 1e-2,
    sparsity: float = 0.0,
    temperature: float = 1.0,
    constraint: str = "simplex",
    lengths: Tensor | None = None,
    per_sequence: bool = False,
    certified: bool = True,
    backend: str = "auto",
) -> Fused:
    """Upsample every scale's output, choose its weights, combine.

    Args:
        outputs: Per scale ``[B, H, N_s, K]``, or ``[B, H, N, K]`` each where ``fine``.
        strides: ``r^s`` of each scale; the first is 1.
        causal: Upsampling and availability as in formulation §3.
        fine: Every token queried every scale: nothing to upsample.
        method: One of

            - ``mean``: equal weights over the available scales;
            - ``static``, ``gate``: softmax of ``logits``;
            - ``convex`` (Eq. 7): ``min ½wᵀMw - (b + a - λ)ᵀw + τ Σ w log w`` with
              ``M = γG + ρI``, ``b = Uy/√K``, over ``constraint``;
            - ``nash`` (Eq. 8): the equilibrium of ``c_s(w) = ½‖u_s - Σ_k w_k u_k‖²/√K + λw_s +
              ½ρw_s²`` over the box, which solves ``M = G + ρI``, ``q = diag(G) - λ``.
        logits: The logits, or ``convex``'s prior ``a``; broadcastable to ``[B, H, N, S]``.
        target: ``y``, ``[B, H, N, K]``; None: ``b = 0``.
        gram_scale: ``γ ≥ 0``, ``[H]``; None: 1.
        ridge, sparsity, temperature, constraint: See above.
        lengths: ``[B]`` real tokens of each row; used by ``per_sequence`` alone.
        per_sequence: Average ``G``, ``b`` and the logits over each row's tokens: one weight vector
            per row and head.
        certified: Return ``residual`` and ``status``; without, their time is saved.
        backend: ``auto``, ``torch`` or ``triton``; the kernel serves ratios that are powers of 2
            and weights per token.

    Numerics: Gram matrices, problems and weights in fp32 at least, whatever the inputs. Coarse
    outputs are upsampled to the second scale's resolution only: ``r`` tokens in a row share them.
    """
    first = outputs[0]
    options = {
        "method": method,
        "logits": logits,
        "target": target,
        "gram_scale": gram_scale,
        "ridge": ridge,
        "sparsity": sparsity,
        "temperature": temperature,
        "constraint": constraint,
    }
    power_of_2 = len(outputs) == 1 or strides[1] & (strides[1] - 1) == 0
    if power_of_2 and not per_sequence and use_triton(backend, *outputs, width=first.shape[-1]):
        from maha_attn.ops.triton import fusion as kernels

        return kernels.fuse(
            outputs, strides=strides, causal=causal, fine=fine, certified=certified, **options
        )
    available = availability(tuple(strides), first.shape[2], causal=causal, device=first.device)
    with _full_precision(first):
        if fine or len(outputs) == 1:
            scales = _Stacked(torch.stack(list(outputs), 3))
        else:
            scales = _Runs(outputs, strides, causal=causal)
        shares = _token_shares(lengths, first) if per_sequence else None
        fused = _fuse(scales, available, shares=shares, certified=certified, **options)
    return fused._replace(output=fused.output.to(first.dtype))


def fuse_stacked(stacked: Tensor, available: Tensor, **options) -> Fused:
    """`fuse` for outputs that are upsampled already, as in decoding.

    Args:
        stacked: ``U``, ``[B, H, N, S, K]``.
        available: bool, broadcastable to ``[B, H, N, S]``.
        options: ``method`` and what follows it in `fuse`, up to ``constraint``, all of them.
    """
    with _full_precision(stacked):
        fused = _fuse(_Stacked(stacked), available, **options)
    return fused._replace(output=fused.output.to(stacked.dtype))


class _Stacked:
    """``U`` in full, ``[B, H, N, S, K]``."""

    def __init__(self, stacked: Tensor) -> None:
        self.u = _at_least_fp32(stacked)
        self.shape, self.width, self.dtype = stacked.shape[:-1], stacked.shape[-1], self.u.dtype

    def products(self, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``UUᵀ`` ``[B, H, N, S, S]`` and ``Uy`` ``[B, H, N, S]``."""
        against = None if target is None else (self.u @ target.to(self.u.dtype)[..., None])[..., 0]
        return self.u @ self.u.mT, against

    def combine(self, weights: Tensor) -> Tensor:
        """``Σ_s w_s u_s``, ``[B, H, N, K]``."""
        return (weights.to(self.u.dtype)[..., None, :] @ self.u)[..., 0, :]


class _Runs:
    """``U`` as runs of ``r`` tokens that share their coarse blocks: the same, in less memory.

    Causal, token ``t`` takes block ``⌊(t+1)/r^s⌋ - 1``. With one token put before the sequence, and
    one zero block before every scale's, run ``g`` is the tokens ``rg … rg+r-1`` and takes block
    ``⌊g/r^(s-1)⌋`` of scale ``s``. Hence ``r`` rows of the finest scale and one of each other:
    ``[B, H, G, r + S - 1, K]``.
    """

    def __init__(self, outputs: Sequence[Tensor], strides: Sequence[int], *, causal: bool) -> None:
        batch, heads, self.length, self.width = outputs[0].shape
        self.shape = (batch, heads, self.length, len(outputs))
        self.before, self.ratio = int(causal), strides[1]
        self.num_runs = -(-(self.length + self.before) // self.ratio)
        parts = [self.runs(_at_least_fp32(outputs[0]))]
        for u, stride in zip(outputs[1:], strides[1:], strict=True):
            blocks = F.pad(_at_least_fp32(u), (0, 0, self.before, 0))
            blocks = blocks.repeat_interleave(stride // self.ratio, 2)
            parts.append(blocks[:, :, : self.num_runs, None])
        self.u = torch.cat(parts, 3)
        self.dtype = self.u.dtype

    def runs(self, x: Tensor) -> Tensor:
        """``[B, H, N, C]`` to ``[B, H, G, r, C]``."""
        after = self.num_runs * self.ratio - self.before - self.length
        return F.pad(x, (0, 0, self.before, after)).unflatten(2, (self.num_runs, self.ratio))

    def tokens(self, runs: Tensor) -> Tensor:
        """``[B, H, G, r, …]`` to ``[B, H, N, …]``."""
        return runs.flatten(2, 3)[:, :, self.before : self.before + self.length]

    def products(self, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `_Stacked.products`."""
        num_scales, last = self.shape[-1], self.ratio - 1
        # Entry by entry: the solver wants the problems contiguous, one matrix entry after another.
        pairs = self.u @ self.u.mT
        own = pairs.diagonal(dim1=-2, dim2=-1)[..., : self.ratio]
        entries = []
        for i in range(num_scales):
            for j in range(num_scales):
                if i == j == 0:
                    entry = own
                elif i == 0 or j == 0:
                    entry = pairs[..., : self.ratio, last + i + j]
                else:
                    entry = pairs[..., last + i, None, last + j].expand(own.shape)
                entries.append(self.tokens(entry))
        gram = torch.stack(entries).unflatten(0, (num_scales, -1)).permute(2, 3, 4, 0, 1)
        if target is None:
            return gram, None
        pairs = self.runs(target.to(self.dtype)) @ self.u.mT
        against = [pairs.diagonal(dim1=-2, dim2=-1), *pairs[..., self.ratio :].unbind(-1)]
        against = torch.stack([self.tokens(entry) for entry in against]).permute(1, 2, 3, 0)
        return gram, against

    def combine(self, weights: Tensor) -> Tensor:
        """As `_Stacked.combine`."""
        first, *others = self.runs(weights.to(self.dtype)).split(1, -1)
        fused = first * self.u[..., : self.ratio, :]
        for s, weight in enumerate(others, self.ratio):
            fused.addcmul_(weight, self.u[..., s, None, :])
        return self.tokens(fused)


def _fuse(
    scales: _Stacked | _Runs,
    available: Tensor,
    *,
    method: str,
    logits: Tensor | None,
    target: Tensor | None,
    gram_scale: Tensor | None,
    ridge: float,
    sparsity: float,
    temperature: float,
    constraint: str,
    shares: Tensor | None = None,
    certified: bool = True,
) -> Fused:
    """`fuse` of any representation; ``shares`` ``[B, 1, N, 1]`` average over each row's tokens."""
    residual = status = None
    if shares is not None:
        available = available[..., :1, :]  # Bidirectional: every scale is available everywhere.
    if method in ("convex", "nash"):
        gram, against = scales.products(target if method == "convex" else None)
        scale = scales.width**-0.5
        matrix = gram * scale
        if method == "nash":
            linear = matrix.diagonal(dim1=-2, dim2=-1) - sparsity
        else:
            linear = (
                matrix.new_full((), -sparsity) if against is None else against * scale - sparsity
            )
            linear = linear if logits is None else linear + logits.to(matrix.dtype)
            if gram_scale is not None:
                matrix = matrix * gram_scale.to(matrix.dtype)[:, None, None, None]
        matrix = matrix + ridge * torch.eye(
            matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
        )
        solution = solve_qp(
            _mean(matrix, None if shares is None else shares[..., None]),
            _mean(linear.expand(scales.shape), shares),
            constraint="box" if method == "nash" else constraint,
            temperature=0.0 if method == "nash" else temperature,
            available=available,
            certified=certified,
        )
        weights = solution.weights
        if certified:
            residual, status = solution.residual, solution.status
    else:
        if logits is None:
            logits = torch.zeros(1, 1, 1, 1, dtype=scales.dtype, device=available.device)
        logits = _at_least_fp32(_mean(logits, shares))
        weights = logits.masked_fill(~available, -torch.inf).softmax(-1)
        weights = weights.expand(*scales.shape[:2], -1, -1)
    return Fused(scales.combine(weights.expand(scales.shape)), weights, residual, status)


def _full_precision(like: Tensor) -> AbstractContextManager:
    """No autocast, on devices that have it (``meta`` has none)."""
    device = like.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _token_shares(lengths: Tensor | None, like: Tensor) -> Tensor:
    """``[B, 1, N, 1]``: 1/length for a row's real tokens, 0 for its padding."""
    length = like.shape[2]
    if lengths is None:
        return torch.full((1, 1, length, 1), 1 / length, device=like.device)
    real = torch.arange(length, device=like.device) < lengths[:, None]
    return (real / lengths.clamp(min=1)[:, None])[:, None, :, None]


def _mean(x: Tensor, shares: Tensor | None) -> Tensor:
    """Mean over a row's tokens (dimension 2); ``x`` itself where each has its own weights."""
    if shares is None or x.shape[2] == 1:
        return x
    return (x * shares.to(x.dtype)).sum(2, keepdim=True)
