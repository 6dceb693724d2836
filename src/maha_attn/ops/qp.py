"""Exact solutions of many small convex quadratic programs (formulation §4).

Fusion poses one problem a token and head, of ``S ≤ 8`` unknowns: the cost of a solver is the memory
that it moves and the operations that it launches, hardly its arithmetic. Hence the choices here and
in `maha_attn.ops._qp_solvers`:

- a short active-set (``τ = 0``) or Newton (``τ > 0``) iteration over all problems at once; those
  that are done drop out;
- fp64 inside, whatever the inputs: the certificate holds at any conditioning met in practice;
- before that, for fp32 problems, a few steps in fp32: nearly all then pass their certificate;
- the derivative by one more solve with the final active set, never through the iteration;
- opaque operators around the data-dependent loops, so that ``torch.compile`` keeps one graph.
"""

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from maha_attn.ops._qp_certificate import certificate, relative_pivot
from maha_attn.ops._qp_quick import quick_active_set, quick_newton
from maha_attn.ops._qp_solvers import (
    active_set,
    far,
    magnitude,
    newton,
    projected_solve,
)

MAX_SCALES = 8
CONSTRAINTS = ("simplex", "capped", "box")
_CPU_CHUNK = 262144  # weights in work together: bounds the workspace
_LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}  # residual of a solved problem, relative


class Status(enum.IntEnum):
    """What became of a problem; of several, the highest."""

    SOLVED = 0
    NOT_CONVERGED = 1
    SINGULAR = 2
    NONFINITE = 3


class QPSolution(NamedTuple):
    """Solution and certificate of each problem; only ``weights`` carries a gradient.

    Attributes:
        weights: ``w``, ``[..., S]``.
        residual: KKT residual of ``weights`` as returned, ``[...]``; defined in `solve_qp`.
        gap: Duality gap of ``weights`` as returned, ``[...]``; defined in `solve_qp`.
        status: `Status`, ``[...]`` int8.
    """

    weights: Tensor
    residual: Tensor
    gap: Tensor
    status: Tensor


def solve_qp(
    M: Tensor,
    q: Tensor,
    constraint: str = "simplex",
    temperature: float = 0.0,
    available: Tensor | None = None,
    certified: bool = True,
) -> QPSolution:
    r"""Minimise ``f(w) = ½wᵀMw - qᵀw + τ Σ w log w`` over a simplex, capped simplex or box.

    The problem of paper Eq. 7 and, over the box, the potential of Eq. 8's game (formulation §4).
    Weights are feasible as returned: ``w ≥ 0`` and, over the box, ``w ≤ 1`` hold exactly, sums to
    rounding; for ``τ = 0`` an inactive weight is exactly 0. Identical scales get equal weights.

    Args:
        M: ``[..., S, S]`` positive definite, ``1 ≤ S ≤ 8``, floating; its symmetric part is used.
        q: ``[..., S]``; leading dimensions broadcast with M's.
        constraint: ``simplex`` (``w ≥ 0, Σw = 1``), ``capped`` (``w ≥ 0, Σw ≤ 1``) or ``box``
            (``0 ≤ w ≤ 1``).
        temperature: ``τ ≥ 0``; 0 for the box.
        available: bool, broadcastable to ``[..., S]``. The weight of a scale that is not available
            is exactly 0; its entries of M and q are ignored, whatever they hold, and get gradient
            0. Where no scale is, all weights are 0 and the problem counts as solved.
        certified: Where not, residual and gap may be NaN, M is taken to be positive definite, and
            what Newton's own criterion accepts (``τ > 0``, fp32) is accepted: it saves a third.

    Returns:
        The solution, in the common dtype of M and q but at least fp32. With ``g = Mw - q``:

        - ``residual``, in absolute terms, zero at the solution only. Box: ``‖w - Π(w - g)‖∞``.
          Simplex: the largest ``|min(w_s, g_s - ν)|``, ``ν = wᵀg/Σw``, and ``|Σw - 1|``. Capped:
          the same with ``ν`` capped at 0, and ``|min(-ν, 1 - Σw)|`` for the last. ``τ > 0``: how
          far ``w`` is from its fixed point ``p`` (``softmax(-g/τ)`` on the simplex), the largest
          ``|w_s - p_s| · min(1, τ / min(w_s, p_s))``.
        - ``gap``: ``f(w)`` less the dual's value at ``w``, which bounds ``f(w) - min f``. For
          ``τ = 0`` it is the Frank–Wolfe gap ``max_v gᵀ(w - v)``; for ``τ > 0``, ``τ KL(w ‖ p)`` on
          the simplex.
        - ``status``: ``NONFINITE`` where M or q holds NaN or infinity (weights are NaN there),
          ``SINGULAR`` where M is not positive definite to the precision of its dtype (weights are
          feasible, the residual says how good), ``NOT_CONVERGED`` where the residual exceeds 1e-12
          (fp64) or 1e-6 (fp32) times ``1 + max M_ss + max |q_s|``. A problem's outcome does not
          depend on the others of the batch.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes that do not fit, ``S`` out of range, an unknown constraint, a temperature
            that is negative or set for the box, tensors on several devices.

    Numerics: fp64 inside; for fp32 problems, early steps in fp32, refined and certified in fp64.
    The gradient in M and q is exact, through the final active set
    (``τ = 0``; at a kink, one of the one-sided derivatives) or the implicit function theorem
    (``τ > 0``): always finite, 0 where the status is ``NONFINITE``, and to be taken once.
    Temperature gets none.
    Cost: some 3 to 8 eliminations of ``⅔S³`` multiply-adds a problem forward, one backward.

    >>> M, q = torch.eye(3), torch.tensor([1.0, 0.5, -1.0])
    >>> solve_qp(M, q).weights
    tensor([0.7500, 0.2500, 0.0000])
    """
    _check_tensors(M, q, available)
    _check_options(constraint, temperature)
    dtype = torch.promote_types(torch.promote_types(M.dtype, q.dtype), torch.float32)
    batch, S = torch.broadcast_shapes(M.shape[:-2], q.shape[:-1]), q.shape[-1]
    M = M.to(dtype).expand(*batch, S, S)
    q = q.to(dtype).expand(*batch, S)
    if available is not None:
        available = available.expand(*batch, S)
    return QPSolution(*_solve_op(M, q, available, constraint, float(temperature), certified))


def nash_conv(G: Tensor, w: Tensor, ridge: float, sparsity: float = 0.0) -> Tensor:
    """NashConv of the scales' game, ``Σ_s [c_s(w) - min_{w'_s ∈ [0, 1]} c_s(w'_s, w_{-s})]``.

    By definition of the costs ``c_s(w) = ½‖u_s - Σ_k w_k u_k‖²/√K + λw_s + ½ρw_s²`` (paper Eq. 8,
    formulation §4), evaluated at ``w`` and at each player's best response, in fp64.

    Args:
        G: Gram matrix ``UUᵀ/√K``, ``[..., S, S]``.
        w: Weights of every player, ``[..., S]``.
        ridge: ``ρ > 0``.
        sparsity: ``λ``.

    Returns:
        ``[...]`` fp64; 0 at the equilibrium only, positive elsewhere.
    """
    G, w = G.double(), w.double()
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    others = (G @ w[..., None])[..., 0] - diagonal * w
    best = ((diagonal - sparsity - others) / (diagonal + ridge)).clamp(0, 1)
    identity = torch.eye(w.shape[-1], dtype=torch.bool, device=w.device)
    deviated = torch.where(identity, best[..., None], w[..., None, :])  # row s: player s deviates

    def costs(profile: Tensor) -> Tensor:
        """``c_s`` of row ``s`` of ``profile`` ``[..., S, S]``."""
        consensus = profile @ G
        distance = diagonal - 2 * consensus.diagonal(dim1=-2, dim2=-1)
        own = profile.diagonal(dim1=-2, dim2=-1)
        return 0.5 * (distance + (consensus * profile).sum(-1) + ridge * own**2) + sparsity * own

    return (costs(w[..., None, :].expand_as(G)) - costs(deviated)).sum(-1)


def _check_tensors(M: Tensor, q: Tensor, available: Tensor | None) -> None:
    for name, x in (("M", M), ("q", q)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating, got {x.dtype}; convert it with .float()")
    if M.dim() < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"M must be [..., S, S], got {tuple(M.shape)}")
    if not 1 <= M.shape[-1] <= MAX_SCALES:
        raise ValueError(f"M must have 1 to {MAX_SCALES} scales, got {M.shape[-1]}")
    if q.dim() < 1 or q.shape[-1] != M.shape[-1]:
        raise ValueError(f"q must be [..., {M.shape[-1]}] as M is, got {tuple(q.shape)}")
    if q.device != M.device:
        raise ValueError(f"q must be on M's device {M.device}, got {q.device}")
    try:
        batch = torch.broadcast_shapes(M.shape[:-2], q.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"q's batch must broadcast with M's {tuple(M.shape[:-2])}, got {tuple(q.shape[:-1])}"
        ) from None
    if available is None:
        return
    if not isinstance(available, Tensor) or available.dtype != torch.bool:
        kind = available.dtype if isinstance(available, Tensor) else type(available).__name__
        raise TypeError(f"available must be a bool tensor, got {kind}")
    if available.device != M.device:
        raise ValueError(f"available must be on M's device {M.device}, got {available.device}")
    full = (*batch, q.shape[-1])
    sizes = zip(reversed(available.shape), reversed(full), strict=False)
    if available.dim() > len(full) or any(a not in (1, b) for a, b in sizes):
        raise ValueError(f"available must broadcast to {full}, got {tuple(available.shape)}")


def _check_options(constraint: str, temperature: float) -> None:
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {CONSTRAINTS}, got {constraint!r}")
    if not isinstance(temperature, int | float):
        kind = type(temperature).__name__
        raise TypeError(f"temperature must be a float (it gets no gradient), got {kind}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if temperature and constraint == "box":
        raise ValueError(f"temperature must be 0 for constraint 'box', got {temperature}")


@torch.library.custom_op("maha_attn::qp_solve", mutates_args=())
def _solve_op(
    M: Tensor,
    q: Tensor,
    available: Tensor | None,
    constraint: str,
    temperature: float,
    certified: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, S = q.shape[:-1], q.shape[-1]
    P = batch.numel()
    M, q = M.reshape(P, S, S), q.reshape(P, S)
    available = None if available is None else available.reshape(P, S)
    out = (q.new_empty(P, S), q.new_empty(P), q.new_empty(P), q.new_empty(P, dtype=torch.int8))
    for part in _chunks(q):
        mask = None if available is None else available[part].T
        solved = _solve_chunk(M[part], q[part], mask, constraint, temperature, certified)
        for whole, piece in zip(out, solved, strict=True):
            whole[part] = piece
    return out[0].view(*batch, S), out[1].view(batch), out[2].view(batch), out[3].view(batch)


@_solve_op.register_fake
def _(M, q, available, constraint, temperature, certified=True):
    batch = q.shape[:-1]
    status = q.new_empty(batch, dtype=torch.int8)
    return q.new_empty(q.shape), q.new_empty(batch), q.new_empty(batch), status


@torch.library.custom_op("maha_attn::qp_adjoint", mutates_args=())
def _adjoint_op(
    M: Tensor, weights: Tensor, grad: Tensor, constraint: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """``q̄ = a`` and ``M̄ = -½(awᵀ + waᵀ)``, where ``a`` solves the reduced system for ``w̄``."""
    S, P = weights.shape[-1], weights.shape[:-1].numel()
    M_pss, w_ps, grad_ps = M.reshape(P, S, S), weights.reshape(P, S), grad.reshape(P, S)
    grad_M, grad_q = M.new_empty(P, S * S), M.new_empty(P, S)
    eps = torch.finfo(weights.dtype).eps
    for part in _chunks(w_ps):
        w = _to_arrays(w_ps[part]).nan_to_num_(0.0)
        d, shift = w, temperature
        if not temperature:
            d = ((w > 0) & (w < 1) if constraint == "box" else w > 0).to(w.dtype)
            shift = 1 - d
        tight = None if constraint == "box" else w.sum(0).ge_(1 - S * eps)
        matrix = _to_arrays(M_pss[part]).nan_to_num_(0.0)
        a = projected_solve(matrix, d, shift, _to_arrays(grad_ps[part]), tight, eps=eps).p
        a.nan_to_num_(0.0, 0.0, 0.0)  # M far from definite
        outer = a[:, None] * w
        grad_q[part] = a.T
        outer = (outer + outer.transpose(0, 1)).mul_(-0.5)
        grad_M[part] = outer.flatten(0, 1).to(M.dtype).T
    return grad_M.view(M.shape), grad_q.view(weights.shape)


@_adjoint_op.register_fake
def _(M, weights, grad, constraint, temperature):
    return M.new_empty(M.shape), M.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    M, _, _, ctx.constraint, ctx.temperature, _ = inputs
    ctx.save_for_backward(M, output[0])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    M, weights = ctx.saved_tensors
    grad_M, grad_q = _adjoint_op(M, weights, grad, ctx.constraint, ctx.temperature)
    return grad_M, grad_q, None, None, None, None


_solve_op.register_autograd(_backward, setup_context=_setup_context)


def _chunks(x: Tensor) -> list[slice]:
    """Slices of the problems of ``x`` ``[P, S]``."""
    size = _CPU_CHUNK // x.shape[1] if x.device.type == "cpu" else max(x.shape[0], 1)
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _to_arrays(x: Tensor) -> Tensor:
    """``[P, S]`` to ``[S, P]``, ``[P, S, S]`` to its symmetric part ``[S, S, P]``; a copy, fp64."""
    y = x.movedim(0, -1).to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    return y if x.dim() == 2 else torch.add(y, y.transpose(0, 1)).mul_(0.5)


def _solve_chunk(
    M_pss: Tensor,
    q_ps: Tensor,
    available: Tensor | None,
    constraint: str,
    temperature: float,
    certified: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = q_ps.dtype
    M, q = _to_arrays(M_pss), _to_arrays(q_ps)
    if available is None:
        available = torch.ones((), dtype=torch.bool, device=q.device).expand_as(q)
    odd, empty, nonfinite = _mend(M, q, available)

    if dtype == torch.float32:
        *solved, late = _attempt(M, q, constraint, temperature, certified)
        if late.numel():
            some = M.index_select(-1, late), q.index_select(-1, late)
            mended = _iterate_to_the_end(*some, available[:, late], dtype, constraint, temperature)
            for whole, piece in zip(solved, mended, strict=True):
                whole[..., late] = piece
    else:
        solved = _iterate_to_the_end(M, q, available, dtype, constraint, temperature)
    weights, residual, gap, status = solved
    weights[:, odd] *= available[:, odd]

    status[empty], residual[empty], gap[empty] = Status.SOLVED, 0, 0
    status[nonfinite] = Status.NONFINITE
    for x in (weights, residual, gap):
        x[..., nonfinite] = torch.nan
    return weights.T, residual, gap, status


def _attempt(
    M: Tensor, q: Tensor, constraint: str, temperature: float, certified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solution in fp32 as if all were solved, and the indices of those that may not be."""
    if temperature:
        w, sure = quick_newton(M, q, constraint, temperature, definite=not certified)
    else:
        w, sure = quick_active_set(M, q, constraint)
    weights = w.float()
    if temperature and not certified:
        unknown = torch.full_like(weights[0], torch.nan)
        status = torch.zeros_like(weights[0], dtype=torch.int8)
        return weights, unknown, unknown.clone(), status, sure.logical_not().nonzero()[:, 0]
    residual, gap = certificate(M, q, weights.double(), constraint, temperature)
    size_q = q.abs()
    limit = size_q.mul_(size_q < far(q.dtype)).amax(0).add_(1).mul_(0.5 * _LIMIT[torch.float32])
    late = sure.logical_and_(residual <= limit).logical_not_().nonzero()[:, 0]
    status = torch.full_like(residual, Status.SOLVED, dtype=torch.int8)
    return weights, residual.float(), gap.float(), status, late


def _iterate_to_the_end(
    M: Tensor, q: Tensor, available: Tensor, dtype: torch.dtype, constraint: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solution in ``dtype`` of any problems, found in fp64, and what became of them."""
    if temperature:
        accuracy = 2e-14 if dtype == torch.float64 else 1e-8
        w = newton(M, q, constraint, temperature, accuracy)
    else:
        w = active_set(M, q, constraint)
    failed = w.isfinite().all(0).logical_not_().nonzero()[:, 0]  # M far from definite
    equal = available[:, failed].to(w.dtype)
    w[:, failed] = equal / equal.sum(0)
    weights = w.to(dtype)
    residual, gap = certificate(M, q, weights.to(q.dtype), constraint, temperature)
    limit = (magnitude(M, q) + 1).mul_(_LIMIT[dtype])
    status = (residual <= limit).logical_not_().to(torch.int8)
    pivot_limit = q.shape[0] * torch.finfo(dtype).eps
    status.masked_fill_(relative_pivot(M) <= pivot_limit, Status.SINGULAR)
    return weights, residual.to(dtype), gap.to(dtype), status


def _mend(M: Tensor, q: Tensor, available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make every problem a regular one, in place: an unavailable scale one that nobody wants.

    A problem without available scales, or with a NaN among these, becomes ``M = I``, ``q = 0``.
    Returns the indices of all problems changed, of those without scales, and of those with NaN.
    """
    finite = (M.sum((0, 1)) + q.sum(0)).isfinite()
    odd = (finite & available.all(0)).logical_not_().nonzero()[:, 0]
    on = available[:, odd]
    M_odd = M[..., odd].masked_fill_(~(on[:, None] & on), 0.0)
    q_odd = q[:, odd].masked_fill_(~on, 0.0)
    finite = (M_odd.sum((0, 1)) + q_odd.sum(0)).isfinite()
    M_odd.masked_fill_(~finite, 0.0).diagonal().T.add_(~(on & finite))
    some = on.any(0)
    q_odd.masked_fill_(~finite, 0.0).masked_fill_(~on & some & finite, -far(q.dtype))
    M[..., odd], q[:, odd] = M_odd, q_odd
    return odd, odd[~some], odd[~finite]
