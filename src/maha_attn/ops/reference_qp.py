"""Slow fp64 twin of `maha_attn.ops.qp` for ``τ = 0``: every active set, one problem at a time."""

from itertools import product

import torch
from torch import Tensor

_AT_ZERO, _FREE, _AT_ONE = 0, 1, 2


def solve_qp_by_enumeration(M: Tensor, q: Tensor, constraint: str = "simplex") -> Tensor:
    """``argmin ½wᵀMw - qᵀw``: solve for each active set, keep the least KKT violation.

    Args:
        M: ``[S, S]`` symmetric positive definite.
        q: ``[S]``.
        constraint: As for `maha_attn.ops.qp.solve_qp`.

    Returns:
        ``[S]`` fp64.
    """
    M, q = M.double(), q.double()
    places = (_AT_ZERO, _FREE, _AT_ONE) if constraint == "box" else (_AT_ZERO, _FREE)
    sums = {"simplex": (True,), "capped": (True, False), "box": (False,)}[constraint]
    best, least = torch.full_like(q, torch.nan), float("inf")
    for *places_of_scales, tight in product(*[places] * len(q), sums):
        where = torch.tensor(places_of_scales)
        if tight and not (where == _FREE).any():
            continue
        w, multiplier = _minimiser(M, q, where, bool(tight))
        violation = _violation(M, q, w, where, multiplier, constraint)
        if violation < least:
            best, least = w, violation
    return best


def _minimiser(M: Tensor, q: Tensor, where: Tensor, tight: bool) -> tuple[Tensor, Tensor]:
    """Minimise over the free weights, the others held; with ``tight``, over ``Σw = 1``."""
    free = where == _FREE
    held = (where == _AT_ONE).double()
    size = int(free.sum())
    system = torch.zeros(size + 1, size + 1, dtype=M.dtype)
    system[:size, :size] = M[free][:, free]
    right = torch.cat([(q - M @ held)[free], torch.tensor([1.0 if tight else 0.0])])
    if tight:
        system[:size, size] = system[size, :size] = 1
    else:
        system[size, size] = 1
    solution = torch.linalg.solve(system, right)
    w = held.clone()
    w[free] = solution[:size]
    return w, solution[size]


def _violation(
    M: Tensor, q: Tensor, w: Tensor, where: Tensor, multiplier: Tensor, constraint: str
) -> float:
    """The largest violation of feasibility or of a multiplier's sign."""
    gradient = M @ w - q + multiplier
    wrong = [-w, -gradient[where == _AT_ZERO], gradient[where == _AT_ONE]]
    if constraint == "box":
        wrong.append(w - 1)
    if constraint == "capped":
        wrong += [w.sum()[None] - 1, -multiplier[None]]
    return torch.cat(wrong).max().clamp(min=0).item()
