"""What solves nearly all fp32 problems: a few steps in fp32, and one refined in fp64.

There is no line search. The caller checks what comes out, and gives what fails to the iterations of
`maha_attn.ops._qp_solvers`, whose layout this shares. Each problem takes the same steps whatever
its neighbours need.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from maha_attn.ops._qp_certificate import relative_pivot
from maha_attn.ops._qp_solvers import far, matvec, plain_newton, projected_solve, soft_choice

_EPS = torch.finfo(torch.float32).eps
_NEWTON_STEPS = 4
_ROUGHLY = 4e-4  # accuracy that a last step makes exact
_SETTLED = 3e-4  # relative change of the weights by a last Newton step, whose error is its square


class Attempt(NamedTuple):
    """Weights in fp64, and whether a problem is definite and settled beyond doubt, bool."""

    weights: Tensor
    sure: Tensor


def quick_active_set(M: Tensor, q: Tensor, constraint: str) -> Attempt:
    """Minimise ``½wᵀMw - qᵀw`` by a primal-dual active-set method.

    Each step solves for the weights and multipliers of a guess of the active set, and frees next
    those weights that come out inside their bounds or whose multipliers want them there: several
    change at once (Hintermüller, Ito & Kunisch, 2003). The first guess frees all, so that its
    pivots are M's. The last step goes from the weights before it by the descent left, in fp64.
    """
    box, S = constraint == "box", q.shape[0]
    M_low, q_low = M.float(), q.clamp(min=-far(torch.float32)).float()
    free = q_low.gt(-far(torch.float32)).float()
    tight = None if box else torch.ones_like(q_low[0])
    held = torch.zeros_like(q_low)
    w, theta = held, held[0]
    definite = theta.bool()
    steps = 3 + S // 4
    for step in range(steps - 1):
        rhs = q_low - matvec(M_low, held) if box and step else q_low
        total = 0.0 if box else 1.0
        found = projected_solve(M_low, free, 1 - free, rhs, tight, total=total)
        if step == 0:
            pivots = (found.pivots / M_low.diagonal().T).nan_to_num_(0.0, 0.0)
            definite = _is_definite(pivots.amin(0), S)
        w, theta = found.p + held, found.theta
        wish = torch.sub(q_low, matvec(M_low, w)).sub_(theta)
        if tight is not None and constraint == "capped":
            tight = (w.sum(0) - 1).mul_(1 - tight).add_(theta).gt(0).float()
        if box:
            wish = wish.mul_(1 - free).sign_()  # a held weight moves by its multiplier's sign
            inside = w + 0.5 * wish
            held = inside.ge(1).float()
            free = inside.gt(0).float().sub_(held)
        else:
            free = torch.mul(wish, 1 - free).add_(w).gt(0).float()
    base = (held + w * free).double()
    multiplier = (theta if tight is None else theta * tight).double()
    descent = torch.sub(q, matvec(M, base)).sub_(multiplier).mul_(free)
    rest = 0.0 if box else (1 - base.sum(0)).float()
    found = projected_solve(M_low, free, 1 - free, descent.float(), tight, total=rest)
    w = base.add_(found.p).clamp_(0, 1)
    return Attempt(w if box else _normalised(w, constraint), definite)


def quick_newton(
    M: Tensor, q: Tensor, constraint: str, temperature: float, *, definite: bool
) -> Attempt:
    """Minimise ``½wᵀMw - qᵀw + τ Σ w log w`` by full steps of Newton's method.

    The last takes its residual in fp64 and has ``w∘y``, ``(M diag(w) + τ) y = M(v - w) - θ``, to
    add to ``w``, which vanishes at the solution: fp32 is enough for it. Where M is known to be
    ``definite``, its pivots are not looked at.
    """
    tau = temperature
    M_low, q_low = M.float(), q.clamp(min=-far(torch.float32)).float()
    v, _ = plain_newton(M_low, q_low, constraint, tau, _ROUGHLY, _NEWTON_STEPS)
    v = v.double()
    choice = soft_choice(q - matvec(M, v), constraint, tau)
    w, tight = choice.weights, choice.tight.float()
    rhs = matvec(M, v.sub_(w)).float()
    change = projected_solve(M_low, w.float(), tau, rhs, tight).p
    settled = (change.abs() - w * _SETTLED).amax(0).le(0)
    # Capped: a sum that is held may hide how far v is from w, and whether to hold it at all.
    settled &= rhs.abs_().amax(0).le(choice.margin.mul_(0.5 * tau))
    w = w.add_(change).clamp_(min=0)
    if not definite:
        settled &= _is_definite(relative_pivot(M_low), q.shape[0])
    return Attempt(_normalised(w, constraint), settled)


def _normalised(w: Tensor, constraint: str) -> Tensor:
    total = w.sum(0)
    return w.div_(total.clamp_(min=1) if constraint == "capped" else total)


def _is_definite(pivot: Tensor, num_scales: int) -> Tensor:
    """Whether a relative pivot in fp32 is positive beyond its rounding."""
    return pivot.gt(100 * num_scales * _EPS)
