"""Fusion: per token and head, weigh the scales' outputs (paper IV-C, formulation §4).

Letters: ``u_s`` the upsampled output of scale ``s``, ``U = (u_1 … u_S)``, ``G = UUᵀ/√K`` their Gram
matrix, ``y`` the target, ``a`` the prior, ``ρ`` ridge, ``λ`` sparsity, ``τ`` temperature.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from maha_attn.ops.pyramid import availability, upsample
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

    Numerics: Gram matrices, problems and weights in fp32 at least, whatever the inputs.
    """
    length = outputs[0].shape[2]
    available = availability(tuple(strides), length, causal=causal, device=outputs[0].device)
    if not fine:
        outputs = [
            upsample(u, stride=stride, length=length, causal=causal)
            for u, stride in zip(outputs, strides, strict=True)
        ]
    stacked = torch.stack(list(outputs), 3)
    return fuse_stacked(
        stacked,
        available,
        method=method,
        logits=logits,
        target=target,
        gram_scale=gram_scale,
        ridge=ridge,
        sparsity=sparsity,
        temperature=temperature,
        constraint=constraint,
        token_weights=_token_weights(lengths, stacked) if per_sequence else None,
    )


def fuse_stacked(
    stacked: Tensor,
    available: Tensor,
    *,
    method: str,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    gram_scale: Tensor | None = None,
    ridge: float = 1e-2,
    sparsity: float = 0.0,
    temperature: float = 1.0,
    constraint: str = "simplex",
    token_weights: Tensor | None = None,
) -> Fused:
    """`fuse` for outputs that are upsampled already.

    Args:
        stacked: ``U``, ``[B, H, N, S, K]``; zero where a scale is unavailable.
        available: bool, broadcastable to ``[B, H, N, S]``.
        token_weights: ``[B, 1, N, 1]``, each token's share of its row's mean; None: a weight vector
            for every token.
    """
    residual = status = None
    if token_weights is not None:
        available = available[..., :1, :]  # Bidirectional: every scale is available everywhere.
    with _full_precision(stacked.device.type):
        u = stacked if stacked.dtype == torch.float64 else stacked.float()
        if method == "mean":
            weights = available / available.sum(-1, keepdim=True).clamp(min=1).to(u.dtype)
            weights = weights.expand(u.shape[:-1])
        elif method in ("static", "gate"):
            assert logits is not None
            logits = _mean(logits.to(u.dtype), token_weights)
            weights = logits.masked_fill(~available, -torch.inf).softmax(-1)
            weights = weights.expand(*u.shape[:2], -1, -1)
        else:
            matrix, linear = _problem(u, method, logits, target, gram_scale, ridge, sparsity)
            matrix = _mean(matrix, None if token_weights is None else token_weights[..., None])
            solution = solve_qp(
                matrix,
                _mean(linear, token_weights),
                constraint="box" if method == "nash" else constraint,
                temperature=0.0 if method == "nash" else temperature,
                available=available,
            )
            weights, residual, status = solution.weights, solution.residual, solution.status
        output = (weights[..., None, :].to(u.dtype) @ u)[..., 0, :]
    return Fused(output.to(stacked.dtype), weights, residual, status)


def _full_precision(device: str) -> AbstractContextManager:
    """No autocast, on devices that have it (``meta`` has none)."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _problem(
    u: Tensor,
    method: str,
    logits: Tensor | None,
    target: Tensor | None,
    gram_scale: Tensor | None,
    ridge: float,
    sparsity: float,
) -> tuple[Tensor, Tensor]:
    """``M`` ``[B, H, N, S, S]`` and ``q`` ``[B, H, N, S]`` of formulation §4."""
    scale = u.shape[-1] ** -0.5
    gram = u @ u.mT * scale
    identity = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
    if method == "nash":
        return gram + ridge * identity, gram.diagonal(dim1=-2, dim2=-1) - sparsity
    linear = gram.new_full((), -sparsity)
    if logits is not None:
        linear = linear + logits.to(u.dtype)
    if target is not None:
        linear = linear + (u @ target.to(u.dtype)[..., None])[..., 0] * scale
    if gram_scale is not None:
        gram = gram * gram_scale.to(u.dtype)[:, None, None, None]
    return gram + ridge * identity, linear.expand(u.shape[:-1])


def _token_weights(lengths: Tensor | None, stacked: Tensor) -> Tensor:
    """``[B, 1, N, 1]``: 1/length for a row's real tokens, 0 for its padding."""
    length = stacked.shape[2]
    if lengths is None:
        return torch.full((1, 1, length, 1), 1 / length, device=stacked.device)
    real = torch.arange(length, device=stacked.device) < lengths[:, None]
    return (real / lengths.clamp(min=1)[:, None])[:, None, :, None]


def _mean(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """Mean over a row's tokens (dimension 2), or ``x`` where every token has its own weights."""
    if token_weights is None or x.dim() < 3:
        return x
    return (x * token_weights.to(x.dtype)).sum(2, keepdim=True) if x.shape[2] > 1 else x
