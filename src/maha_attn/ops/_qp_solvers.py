"""The two iterations behind `maha_attn.ops.qp`, in structure-of-arrays layout.

Shapes: ``M`` is ``[S, S, P]``, a vector of a problem ``[S, P]``, a scalar of a problem ``[P]``,
with the ``P`` problems contiguous: one step of an elimination is one operation over all problems.
All is fp64, but for the early steps of fp32 problems. Masks are 0.0 or 1.0, since arithmetic on
them is vectorised where ``torch.where`` is not. Both iterations, and the derivative of what they
find, solve one and the same reduced system, `projected_solve`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-300
_ACTIVE_SET_STEPS = 64  # 19 were the most seen in millions of problems
_PLAIN_STEPS = 8
_DAMPED_STEPS = 100
_CPU_BLOCK = 65536  # weights advanced together: what they touch stays in cache
_EPS = torch.finfo(torch.float64).eps

State = dict[str, Tensor]


def far(dtype: torch.dtype) -> float:
    """An unavailable scale's linear term is ``-far``: no step finds it worth a weight."""
    return 1e100 if dtype == torch.float64 else 1e30


def matvec(M: Tensor, w: Tensor) -> Tensor:
    """``Mw`` for symmetric ``M``."""
    product = M[0] * w[0]
    for k in range(1, w.shape[0]):
        product.addcmul_(M[k], w[k])
    return product


class Reduced(NamedTuple):
    """What `projected_solve` finds, and the pivots of its elimination."""

    p: Tensor
    theta: Tensor
    pivots: Tensor


def projected_solve(
    M: Tensor,
    d: Tensor,
    shift: Tensor | float,
    rhs: Tensor,
    tight: Tensor | None,
    *,
    total: Tensor | float = 0.0,
    eps: float | None = None,
) -> "Reduced":
    """``p = d∘(x - θy)`` with ``(M diag(d) + diag(shift)) [x, y] = [rhs, 1]``.

    Where ``tight`` is 1, θ makes ``Σp = total``; where it is 0, or None for all, so is θ.

    - ``d`` the 0/1 mask of the free weights and ``shift = 1 - d``: ``p`` minimises
      ``½pᵀMp - rhsᵀp`` over the free weights.
    - ``d = w`` and ``shift = τ``: ``p = (M + τ diag(1/w))⁻¹ rhs``, without dividing by ``w``.

    Elimination without pivoting: the matrix is diagonally similar to ``√d M √d + shift``, positive
    definite, and has the same pivots. One that is lost to rounding is kept at ``S·eps`` of its
    diagonal entry, so the result is finite for any ``M``. Cost: ``⅔S³`` multiply-adds a problem.
    """
    S = d.shape[0]
    info = torch.finfo(d.dtype)
    T = d.new_empty(S, S + 1 + (tight is not None), d.shape[1])
    torch.mul(M, d, out=T[:, :S])
    diagonal = T[:, :S].diagonal().T
    diagonal.add_(shift)
    diagonal.clamp_(min=0).add_(diagonal.le(0))
    floor = diagonal * (S * (info.eps if eps is None else eps))
    T[:, S] = rhs
    T[:, S + 1 :] = 1
    reciprocals = []
    for j in range(S):
        reciprocal = torch.maximum(T[j, j], floor[j]).reciprocal_()
        reciprocals.append(reciprocal)
        if j + 1 < S:
            factors = (T[j + 1 :, j] * reciprocal)[:, None]
            T[j + 1 :, j + 1 :].addcmul_(factors, T[j, None, j + 1 :], value=-1)
    for j in reversed(range(S)):
        solved = T[j, None, S:].mul_(reciprocals[j])
        if j:
            T[:j, S:].addcmul_(T[:j, j, None], solved, value=-1)
    x, pivots = T[:, S], T.diagonal().T
    if tight is None:
        return Reduced(x * d, torch.zeros_like(x[0]), pivots)
    y = T[:, S + 1]
    sum_x, sum_y = (T[:, S:] * d[:, None]).sum(0)
    theta = sum_x.sub_(total).mul_(tight).div_(sum_y.clamp_(min=info.tiny))
    return Reduced(torch.addcmul(x, y, theta, value=-1).mul_(d), theta, pivots)


def _iterate(step: Callable[[State], Tensor], state: State, steps: int) -> Tensor | None:
    """Run ``step`` until every problem is done; ``state["w"]`` is the result, in place.

    ``step`` advances a state in place and returns 1.0 for the problems that are done, which it
    leaves as they are from then on: no problem's result depends on its neighbours. On a CPU it sees
    a block of problems at a time. Whenever half of those in work are done, they are dropped. One
    synchronisation with the device a step. Returns the indices of those never done, or None.
    """
    result, index = state["w"], None
    for _ in range(steps):
        num_scales, size = state["w"].shape
        if result.device.type == "cpu":
            size = _CPU_BLOCK // num_scales
        blocks = zip(*(x.split(size, -1) for x in state.values()), strict=True)
        done = torch.cat([step(dict(zip(state, block, strict=True))) for block in blocks])
        left = int(done.eq(0).sum())
        if left == 0 or 2 * left <= done.numel():
            if index is not None:
                result[:, index] = state["w"]
            if left == 0:
                return None
            keep = (done == 0).nonzero()[:, 0]
            index = keep if index is None else index[keep]
            state = {name: x.index_select(-1, keep) for name, x in state.items()}
    if index is None:
        return torch.arange(result.shape[1], device=result.device)
    result[:, index] = state["w"]
    return index


def active_set(M: Tensor, q: Tensor, constraint: str) -> Tensor:
    """Minimise ``½wᵀMw - qᵀw`` by a primal active-set method in step form.

    The iterate stays feasible. Each step solves for the minimiser over the free weights (and over
    ``Σw = 1`` where that is ``tight``) from where it is, goes there or to the first bound in the
    way, which it then holds; from a minimiser it releases the worst multiplier. The objective falls
    from one minimiser to the next, so no active set comes twice and the number of steps is finite
    (Nocedal & Wright, Numerical Optimization, algorithm 16.3). A problem is done when gradient and
    multipliers are right to rounding; the steps before that act as iterative refinement, which is
    why conditioning costs a step and no accuracy.
    """
    free = q.gt(-far(q.dtype)).to(q.dtype)
    state = {
        "M": M,
        "q": q,
        "w": free / free.sum(0),
        "free": free,
        "tight": torch.full_like(q[0], constraint != "box"),
        "tolerance": (4 * q.shape[0] * _EPS) * magnitude(M, q),
    }
    _iterate(lambda state: _active_set_step(state, constraint), state, _ACTIVE_SET_STEPS)
    return state["w"]


def _active_set_step(state: State, constraint: str) -> Tensor:
    M, q, w, free, tight, tolerance = (
        state[name] for name in ("M", "q", "w", "free", "tight", "tolerance")
    )
    box = constraint == "box"
    descent = torch.sub(q, matvec(M, w))
    multiplier = tight
    if not box:
        multiplier = (free * descent).sum(0).div_(free.sum(0).clamp_(min=1)).mul_(tight)
        descent -= multiplier
    inner = free * descent
    wish = descent - inner  # how much a held weight wants off its bound
    if box:
        wish.mul_(1 - 2 * w)
    stationary = inner.abs_().amax(0).le_(tolerance)
    worst = wish.amax(0)
    if constraint == "capped":
        worst = torch.maximum(worst, -multiplier)
    release = torch.gt(worst, tolerance).mul(stationary)
    active = 1 - stationary + release
    free.add_(wish.ge_(worst).mul_(release))
    if constraint == "capped":
        loosen = torch.ge(-multiplier, worst).mul(release)
        descent.addcmul_(loosen, multiplier)
        tight.sub_(loosen)

    p = projected_solve(M, free, 1 - free, descent, None if box else tight).p.mul_(active)
    # The reciprocal of the step to each bound, negative; what is below -1 is in the way.
    approach = p / (w + _TINY)
    if box:
        approach = torch.minimum(approach, p / (w - 1).sub_(_TINY))
    fastest = approach.amin(0).clamp_(max=-1)
    if constraint == "capped":
        to_cap = p.sum(0).div_((w.sum(0) - 1).clamp_(max=-_TINY)).mul_(1 - tight)
        fastest = torch.minimum(fastest, to_cap)
        tight.add_(to_cap.le_(fastest))
    held = approach.le_(fastest)
    free.sub_(held)
    w.addcmul_(p, fastest.reciprocal_(), value=-1)
    if box:
        w.clamp_(0, 1).lerp_(p.gt(0).to(p.dtype), held)
    else:
        w.clamp_(min=0).mul_(1 - held)
        w.div_((w.sum(0) - 1).mul_(tight).add_(1))
    return 1 - active


def newton(M: Tensor, q: Tensor, constraint: str, temperature: float, accuracy: float) -> Tensor:
    """Minimise ``½wᵀMw - qᵀw + τ Σ w log w`` over simplex or capped simplex by its dual.

    The dual ``min_v D(v) = ½vᵀMv + h*(q - Mv)``, with ``h*`` of `soft_choice`, is smooth and
    unconstrained, and solved by ``v = w(v)``, ``w = ∇h*(q - Mv)``. Newton's method for it goes to
    ``v⁺ = w∘u``, ``τu = τ + M(v - v⁺) - θ`` (`projected_solve`). A problem is done with the step
    that changes no ``log w`` by more than ``√accuracy``, since convergence is quadratic; near
    capped's kink, where it need not be, with one that changes ``Mv`` by rounding alone.

    From halfway between equal weights and ``w`` of those, a few plain steps usually do. Where τ is
    small against ``q`` and ``M``, ``D`` is nearly piecewise linear: problems that are late start
    again from the solution for τ = 0, which is within ``O(τ)``, and halve each step until ``D``
    falls enough.
    """
    v, late = plain_newton(M, q, constraint, temperature, accuracy, _PLAIN_STEPS)
    if late is not None:
        M_late, q_late = M.index_select(-1, late), q.index_select(-1, late)
        v_late = active_set(M_late, q_late, constraint)
        _damped_newton(M_late, q_late, v_late, constraint, temperature, accuracy)
        v[:, late] = v_late
    v.clamp_(min=0)
    total = v.sum(0)
    return v.div_(total.clamp_(min=1) if constraint == "capped" else total)


def plain_newton(
    M: Tensor, q: Tensor, constraint: str, temperature: float, accuracy: float, steps: int
) -> tuple[Tensor, Tensor | None]:
    """`newton`'s full steps alone, in the dtype of ``M``; and the problems that want more."""
    available = q.gt(-far(q.dtype)).to(q.dtype)
    v = available / available.sum(0)
    v = soft_choice(q - matvec(M, v), constraint, temperature).weights.add_(v).mul_(0.5)
    state = {"M": M, "q": q, "w": v, "Mv": matvec(M, v), "open": torch.ones_like(q[0])}
    eps = torch.finfo(q.dtype).eps
    state["floor"] = magnitude(M, q).add_(temperature).mul_(100 * eps)

    def plain(state: State) -> Tensor:
        target, M_target, choice = _newton_target(state, constraint, temperature)
        change = (M_target - state["Mv"]).abs_().amax(0)
        threshold = choice.margin.clamp_(max=accuracy**0.5).mul_(temperature)
        torch.maximum(threshold, state["floor"], out=threshold)
        state["Mv"].copy_(M_target)
        done = change.le_(threshold).mul_(state["open"])
        state["w"].lerp_(target, done)
        return 1 - state["open"].sub_(done)

    return v, _iterate(plain, state, steps)


def _newton_target(
    state: State, constraint: str, tau: float
) -> tuple[Tensor, Tensor, "SoftChoice"]:
    """``v⁺``, ``Mv⁺``, and the choice at ``v``."""
    M, Mv = state["M"], state["Mv"]
    choice = soft_choice(state["q"] - Mv, constraint, tau)
    target = projected_solve(M, choice.weights, tau, Mv + tau, choice.tight, total=1.0).p
    return target, matvec(M, target), choice


def _damped_newton(
    M: Tensor, q: Tensor, v: Tensor, constraint: str, tau: float, accuracy: float
) -> None:
    """Newton with backtracking from ``v``, in place."""
    state = {
        "M": M,
        "q": q,
        "w": v,
        "Mv": matvec(M, v),
        "step": torch.zeros_like(v),
        "M_step": torch.zeros_like(v),
        "open": torch.ones_like(q[0]),
        "value": torch.full_like(q[0], 1 / _TINY),
        "slope": torch.zeros_like(q[0]),
        "floor": (100 * _EPS) * magnitude(M, q).add_(tau),
    }

    def damped(state: State) -> Tensor:
        v, Mv, is_open = state["w"], state["Mv"], state["open"]
        target, M_target, choice = _newton_target(state, constraint, tau)
        value = (v * Mv).sum(0).mul_(0.5).add_(soft_value(state["q"] - Mv, constraint, tau))
        bound = torch.add(state["value"], state["slope"], alpha=1e-4).add_(state["floor"])
        good = value.le(bound).to(v.dtype)
        M_step = M_target.sub_(Mv)
        threshold = choice.margin.clamp_(max=accuracy**0.5).mul_(tau)
        torch.maximum(threshold, state["floor"], out=threshold)
        done = M_step.abs().amax(0).le_(threshold).mul_(good)
        slope = (v - choice.weights).mul_(M_step).sum(0)
        # From a good point go on by its Newton step, from a bad one back by half of the last.
        step = state["step"].mul_(-0.5).lerp_(target.sub_(v), good)
        M_step = state["M_step"].mul_(-0.5).lerp_(M_step, good)
        v.addcmul_(step, is_open)
        Mv.addcmul_(M_step, is_open)
        direction = 2 * good - 1
        step.mul_(direction)
        M_step.mul_(direction)
        state["value"].lerp_(value, good)
        state["slope"].mul_(0.5).lerp_(slope, good)
        return 1 - is_open.mul_(1 - done)

    _iterate(damped, state, _DAMPED_STEPS)


class SoftChoice(NamedTuple):
    """What `soft_choice` finds; ``margin`` is how far from the kink, in ``y/τ``."""

    weights: Tensor
    tight: Tensor
    margin: Tensor


def soft_choice(y: Tensor, constraint: str, tau: float) -> SoftChoice:
    """``argmax`` of ``yᵀw - τ Σ w log w`` over the set, and where ``Σw = 1`` binds.

    Simplex: ``softmax(y/τ)``. Capped: ``exp(y/τ - 1)`` while that sums to at most 1, else the same.
    """
    z = y * (1 / tau)
    weights = z.softmax(0)
    if constraint == "simplex":
        return SoftChoice(weights, torch.ones_like(z[0]), torch.full_like(z[0], torch.inf))
    excess = z.logsumexp(0).sub_(1)
    weights.mul_(excess.clamp(max=0).exp_())
    return SoftChoice(weights, excess.gt(0).to(z.dtype), excess.abs_())


def soft_value(y: Tensor, constraint: str, tau: float) -> Tensor:
    """``max`` of ``yᵀw - τ Σ w log w`` over the set."""
    lse = (y * (1 / tau)).logsumexp(0)
    if constraint == "capped":
        excess = lse.sub_(1)
        lse = excess.clamp(max=0).exp_().add_(excess.clamp_(min=0))
    return lse.mul_(tau)


def magnitude(M: Tensor, q: Tensor) -> Tensor:
    """The size of a problem's numbers, ``max M_ss + max |q_s|`` over its available scales."""
    size_q = q.abs()
    return M.diagonal().T.amax(0) + size_q.mul_(size_q.lt(far(q.dtype))).amax(0)
