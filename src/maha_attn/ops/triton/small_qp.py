"""Device functions: exact solutions of small QPs, one a lane, in registers (formulation §4).

A vector of a problem is a tuple of ``S`` tensors, a symmetric matrix a tuple of such rows, a scalar
a tensor. All tensors have one shape, with a problem in each element, so everything is elementwise
but the test for the end of an iteration. Loops over scales are unrolled. All is fp32.

The linear term of an unavailable scale is ``-FAR``; its row of ``M`` is 0 but for the diagonal. A
problem that is done is frozen: no result depends on the problems that share its tile. A problem
with NaN counts as done.
"""

# A kernel's parameters have no Python types, and its language no starred expressions.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

FAR = tl.constexpr(1e30)
EPS = tl.constexpr(1.1920929e-07)
LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(-115.0)  # log2 of the smallest soft weight: its reciprocal is finite
NEWTON_STEPS = tl.constexpr(32)
ACTIVE_SET_STEPS = tl.constexpr(48)

SOLVED = tl.constexpr(0)  # the values of maha_attn.ops.qp.Status
NOT_CONVERGED = tl.constexpr(1)
SINGULAR = tl.constexpr(2)
NONFINITE = tl.constexpr(3)


@triton.jit
def dot(a, b):
    """``aᵀb``."""
    result = a[0] * b[0]
    for s in tl.static_range(1, len(a)):
        result += a[s] * b[s]
    return result


@triton.jit
def total(a):
    """``Σ_s a_s``."""
    result = a[0]
    for s in tl.static_range(1, len(a)):
        result += a[s]
    return result


@triton.jit
def largest(a):
    """``max_s a_s``."""
    result = a[0]
    for s in tl.static_range(1, len(a)):
        result = tl.maximum(result, a[s])
    return result


@triton.jit
def matvec(M, w):
    """``Mw``."""
    result = ()
    for s in tl.static_range(len(w)):
        result = result + (dot(M[s], w),)
    return result


@triton.jit
def magnitude(M, q):
    """The size of a problem's numbers, ``max M_ss + max |q_s|`` over its available scales."""
    size_M, size_q = M[0][0], tl.abs(q[0])
    for s in tl.static_range(1, len(q)):
        size_M = tl.maximum(size_M, M[s][s])
        size_q = tl.maximum(size_q, tl.where(q[s] != -FAR, tl.abs(q[s]), 0.0))
    return size_M + size_q


@triton.jit
def cholesky(M, shift):
    """Strictly lower rows of ``L`` and ``1/L_ii``, with ``LLᵀ = M + diag(shift)``.

    A pivot lost to rounding is kept at ``S·eps`` of its diagonal entry, so the result is finite.
    """
    S: tl.constexpr = len(shift)
    L, inverse = (), ()
    for i in tl.static_range(S):
        row = ()
        diagonal = M[i][i] + shift[i]
        pivot = diagonal
        for j in tl.static_range(i):
            entry = M[i][j]
            for k in tl.static_range(j):
                entry -= row[k] * L[j][k]
            entry *= inverse[j]
            row = row + (entry,)
            pivot -= entry * entry
        L = L + (row,)
        inverse = inverse + (tl.rsqrt(tl.maximum(pivot, diagonal * (S * EPS))),)
    return L, inverse


@triton.jit
def substitute(L, inverse, rhs):
    """``x`` with ``LLᵀx = rhs``."""
    S: tl.constexpr = len(rhs)
    y, x = (), ()
    for i in tl.static_range(S):
        value = rhs[i]
        for k in tl.static_range(i):
            value -= L[i][k] * y[k]
        y = y + (value * inverse[i],)
    for i in tl.static_range(S - 1, -1, -1):
        value = y[i]
        for k in tl.static_range(i + 1, S):
            value -= L[k][i] * x[k - i - 1]
        x = (value * inverse[i],) + x
    return x


@triton.jit
def reduced_solve(M, shift, rhs, excess, tight, CONSTRAINT: tl.constexpr):
    """``p`` with ``(M + diag(shift)) p = rhs - θ1``: one step of either method, or its adjoint.

    ``shift`` is ``τ/w`` where ``τ > 0``, else 0 for free weights and ``FAR`` for held ones, which
    keeps them. Over simplex and capped simplex θ makes ``Σp = -excess``: where ``tight`` is 1, or,
    where ``tight`` is None, on the simplex always and on the capped one if θ is then positive.
    """
    L, inverse = cholesky(M, shift)
    p = substitute(L, inverse, rhs)
    if CONSTRAINT != "box":
        ones = ()
        for _ in tl.static_range(len(rhs)):
            ones = ones + (1.0,)
        y = substitute(L, inverse, ones)
        theta = (total(p) + excess) / total(y)
        if tight is not None:
            theta *= tight
        elif CONSTRAINT == "capped":
            theta = tl.maximum(theta, 0.0)
        x = p
        p = ()
        for s in tl.static_range(len(rhs)):
            p = p + (x[s] - theta * y[s],)
    return p


@triton.jit
def newton(M, q, tau, CONSTRAINT: tl.constexpr):
    """Minimise ``½wᵀMw - qᵀw + τ Σ w log w``, ``τ > 0``, over simplex or capped simplex.

    Newton's method in ``log w`` on ``Mw - q + τ(log w + 1) + ν = 0``. Bounding the growth of
    ``log w`` to 1 a step, and nothing else, makes it converge without a line search at any ratio of
    ``M`` and ``q`` to ``τ``: where a weight shrinks, the step in ``log w`` is the cautious one. The
    start is one step from equal weights with the diagonal of the Hessian, bounded likewise. It ends
    with the step whose square is lost to rounding: the third mostly.
    """
    S: tl.constexpr = len(q)
    available, log2_w, linear = (), (), ()
    for s in tl.static_range(S):
        available = available + (tl.where(q[s] != -FAR, 1.0, 0.0),)
        linear = linear + (tl.where(q[s] != -FAR, q[s] - tau, 0.0),)
    share = 1.0 / total(available)
    curvature = tau + M[0][0] * share
    rises = ()
    for s in tl.static_range(S):
        curvature = tl.maximum(curvature, tau + M[s][s] * share)
        rises = rises + ((linear[s] - total(M[s]) * share) * available[s],)
    mean = total(rises) * share
    for s in tl.static_range(S):
        rise = tl.minimum(tl.maximum((rises[s] - mean) / curvature, -4.0), 2.0)
        start = tl.log2(share) + rise * LOG2E
        log2_w = log2_w + (tl.where(q[s] != -FAR, start, SMALLEST),)
    accuracy = tl.minimum(tl.maximum(magnitude(M, q) / tau * (2 * EPS), 7e-4), 0.1)
    is_open = share > 0.0
    tau2 = tau / LOG2E
    steps = 0
    while (tl.max(is_open.to(tl.int32), 0) > 0) & (steps < NEWTON_STEPS):
        w, shift, reciprocal, rhs = (), (), (), ()
        for s in tl.static_range(S):
            w = w + (tl.exp2(log2_w[s]),)
            reciprocal = reciprocal + (tl.exp2(log2_w[s] * -1.0),)
            shift = shift + (tau * reciprocal[s],)
        for s in tl.static_range(S):
            rhs = rhs + (linear[s] - tau2 * log2_w[s] - dot(M[s], w),)
        p = reduced_solve(M, shift, rhs, total(w) - 1.0, None, CONSTRAINT)
        change = tau * 0.0
        old = log2_w
        log2_w = ()
        for s in tl.static_range(S):
            d = p[s] * reciprocal[s]
            new = tl.maximum(old[s] + tl.minimum(d, 1.0) * LOG2E, SMALLEST)
            if s > 0:
                new = tl.where(q[s] != -FAR, new, SMALLEST)
            change = tl.maximum(change, tl.where(new > SMALLEST, tl.abs(d), 0.0))
            log2_w = log2_w + (tl.where(is_open, new, old[s]),)
        is_open = is_open & (change > accuracy)
        steps += 1
    w = ()
    for s in tl.static_range(S):
        w = w + (tl.where(q[s] != -FAR, tl.exp2(log2_w[s]), 0.0),)
    mass = total(w)
    if CONSTRAINT == "capped":
        mass = tl.maximum(mass, 1.0)
    result = ()
    for s in tl.static_range(S):
        result = result + (w[s] / mass,)
    return result


@triton.jit
def examine(M, q, w, free, tight, tolerance, is_open, CONSTRAINT: tl.constexpr):
    """What is left to do at ``w``: the right side of the next step, with what it may move.

    From a minimiser over the free weights, release the worst multiplier; where none is wrong, the
    problem is done. Returns ``rhs``, ``free``, ``tight``, ``is_open``.
    """
    S: tl.constexpr = len(q)
    slope = tolerance * 0.0
    multiplier, gradient, wrong, rhs = slope, (), (), ()
    for s in tl.static_range(S):
        gradient = gradient + (dot(M[s], w) - q[s],)
    if CONSTRAINT != "box":
        multiplier = tight * dot(free, gradient) / tl.maximum(total(free), 1.0)
    # A weight held at 0 wants to rise where its gradient is negative, one held at 1 to fall.
    for s in tl.static_range(S):
        g = gradient[s] - multiplier
        slope = tl.maximum(slope, tl.abs(free[s] * g))
        wrong = wrong + ((1.0 - free[s]) * (2.0 * w[s] - 1.0) * g,)
    worst = largest(wrong)
    if CONSTRAINT == "capped":
        worst = tl.maximum(worst, multiplier)
    release = (slope <= tolerance) & (worst > tolerance)
    is_open = is_open & ((slope > tolerance) | release)
    if CONSTRAINT == "capped":
        loosen = release & (multiplier >= worst)
        tight = tl.where(loosen, 0.0, tight)
        multiplier = tl.where(loosen, 0.0, multiplier)
    held = free
    free = ()
    for s in tl.static_range(S):
        free = free + (tl.where(release & (wrong[s] >= worst), 1.0, held[s]),)
        rhs = rhs + (free[s] * (multiplier - gradient[s]),)
    return rhs, free, tight, is_open


@triton.jit
def active_set(M, q, CONSTRAINT: tl.constexpr):
    """Minimise ``½wᵀMw - qᵀw`` over simplex, capped simplex or box by a primal active-set method.

    From where it is, ``w`` goes to the minimiser over its free weights or to the first bound in the
    way, which it then holds; from a minimiser it releases the worst multiplier (Nocedal & Wright,
    Numerical Optimization, algorithm 16.3). The start is the minimiser without bounds, brought back
    into them: mostly the right active set. Steps are solved from the current gradient, so those
    after the last change refine the solution, and rounding in a step costs no accuracy.
    """
    S: tl.constexpr = len(q)
    zero = q[0] * 0.0
    free, w, shift, rhs = (), (), (), ()
    for s in tl.static_range(S):
        shift = shift + (tl.where(q[s] != -FAR, 0.0, FAR),)
        rhs = rhs + (tl.where(q[s] != -FAR, q[s], 0.0),)
    tight = zero + 1.0
    unbounded = reduced_solve(M, shift, rhs, zero - 1.0, tight, CONSTRAINT)
    for s in tl.static_range(S):
        inside = (unbounded[s] > 0.0) & (q[s] != -FAR)
        value = tl.where(inside, unbounded[s], 0.0)
        if CONSTRAINT == "box":
            inside = inside & (value < 1.0)
            value = tl.minimum(value, 1.0)
        free = free + (tl.where(inside, 1.0, 0.0),)
        w = w + (value,)
    if CONSTRAINT != "box":
        mass = total(w)
        unscaled = w
        w = ()
        for s in tl.static_range(S):
            w = w + (unscaled[s] / mass,)
    tolerance = magnitude(M, q) * (4 * EPS)
    is_open = zero == 0.0
    rhs, free, tight, is_open = examine(M, q, w, free, tight, tolerance, is_open, CONSTRAINT)
    steps = 0
    while (tl.max(is_open.to(tl.int32), 0) > 0) & (steps < ACTIVE_SET_STEPS):
        shift = ()
        for s in tl.static_range(S):
            shift = shift + ((1.0 - free[s]) * FAR,)
        p = reduced_solve(M, shift, rhs, zero, tight, CONSTRAINT)
        # The reciprocal of the step to each bound; whatever exceeds 1 is in the way.
        approach, move = (), ()
        for s in tl.static_range(S):
            step = tl.where(is_open, free[s] * p[s], 0.0)
            room = tl.where(step > 0.0, 1.0 - w[s] if CONSTRAINT == "box" else FAR, w[s])
            move = move + (step,)
            approach = approach + (tl.abs(step) / (room + 1e-30),)
        fastest = tl.maximum(largest(approach), 1.0)
        if CONSTRAINT == "capped":
            to_cap = (1.0 - tight) * total(move) / tl.maximum(1.0 - total(w), 1e-30)
            fastest = tl.maximum(fastest, to_cap)
            tight = tl.where(to_cap >= fastest, 1.0, tight)
        fraction = 1.0 / fastest
        old_w, old_free = w, free
        free, w = (), ()
        for s in tl.static_range(S):
            held = approach[s] >= fastest
            new = old_w[s] + fraction * move[s]
            if CONSTRAINT == "box":
                new = tl.minimum(tl.maximum(new, 0.0), 1.0)
                new = tl.where(held, tl.where(move[s] > 0.0, 1.0, 0.0), new)
            else:
                new = tl.where(held, 0.0, tl.maximum(new, 0.0))
            free = free + (tl.where(held, 0.0, old_free[s]),)
            w = w + (new,)
        if CONSTRAINT != "box":
            scale = 1.0 / (1.0 + (total(w) - 1.0) * tight)
            unscaled = w
            w = ()
            for s in tl.static_range(S):
                w = w + (tl.where(is_open, unscaled[s] * scale, old_w[s]),)
        rhs, free, tight, is_open = examine(M, q, w, free, tight, tolerance, is_open, CONSTRAINT)
        steps += 1
    return w


@triton.jit
def solve(M, q, tau, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr):
    """The weights; ``SOFT``: ``τ > 0``."""
    if SOFT:
        return newton(M, q, tau, CONSTRAINT)
    else:
        return active_set(M, q, CONSTRAINT)


@triton.jit
def adjoint(M, w, grad, tau, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr):
    """``q̄`` for ``w̄ = grad``; then ``M̄ = -½(q̄wᵀ + wq̄ᵀ)``. Zero for weights that are 0."""
    S: tl.constexpr = len(w)
    shift = ()
    for s in tl.static_range(S):
        if SOFT:
            shift = shift + (tau / tl.maximum(w[s], 1e-34),)
        elif CONSTRAINT == "box":
            shift = shift + (tl.where((w[s] > 0.0) & (w[s] < 1.0), 0.0, FAR),)
        else:
            shift = shift + (tl.where(w[s] > 0.0, 0.0, FAR),)
    tight = tl.where(total(w) >= 1.0 - S * EPS, 1.0, 0.0) if CONSTRAINT == "capped" else None
    p = reduced_solve(M, shift, grad, w[0] * 0.0, tight, CONSTRAINT)
    result = ()
    for s in tl.static_range(S):
        result = result + (tl.where((w[s] > 0.0) & (shift[s] < FAR), p[s], 0.0),)
    return result


@triton.jit
def certify(M, q, w, tau, CONSTRAINT: tl.constexpr, SOFT: tl.constexpr):
    """KKT residual and status of ``w``, as `maha_attn.ops.qp.solve_qp` defines them."""
    S: tl.constexpr = len(q)
    zero = q[0] * 0.0
    gradient = ()
    for s in tl.static_range(S):
        gradient = gradient + (dot(M[s], w) - q[s],)
    residual = zero
    if CONSTRAINT == "box":
        for s in tl.static_range(S):
            moved = tl.minimum(tl.maximum(w[s] - gradient[s], 0.0), 1.0)
            residual = tl.maximum(residual, tl.abs(w[s] - moved))
    elif SOFT:
        # The fixed point is softmax(-g/τ), or exp(-g/τ - 1) where the cap leaves it room.
        y = ()
        for s in tl.static_range(S):
            y = y + (gradient[s] * -1.0 / (tau / LOG2E),)
        top = largest(y)
        e = ()
        for s in tl.static_range(S):
            e = e + (tl.exp2(y[s] - top),)
        mass = total(e)
        scale = 1.0 / mass
        if CONSTRAINT == "capped":
            scale *= tl.exp2(tl.minimum(tl.log2(mass) + top - LOG2E, 0.0))
        for s in tl.static_range(S):
            p = e[s] * scale
            slack = tl.minimum(tau / tl.maximum(tl.minimum(w[s], p), 1e-30), 1.0)
            residual = tl.maximum(residual, tl.abs(w[s] - p) * slack)
    else:
        mass = total(w)
        multiplier = dot(w, gradient) / tl.maximum(mass, 1e-30)
        residual = tl.abs(mass - 1.0)
        if CONSTRAINT == "capped":
            multiplier = tl.minimum(multiplier, 0.0)
            residual = tl.abs(tl.minimum(-multiplier, 1.0 - mass))
        for s in tl.static_range(S):
            residual = tl.maximum(residual, tl.abs(tl.minimum(w[s], gradient[s] - multiplier)))
    size = magnitude(M, q)
    zeros, singular = (), zero
    for _ in tl.static_range(S):
        zeros = zeros + (zero,)
    _, inverse = cholesky(M, zeros)
    for s in tl.static_range(S):
        singular = tl.maximum(singular, M[s][s] * inverse[s] * inverse[s])
    status = tl.where(residual <= 1e-6 * (1.0 + size), SOLVED, NOT_CONVERGED)
    status = tl.where(singular >= 0.999 / (S * EPS), SINGULAR, status)
    # NaN and infinity both fail this: a maximum alone would drop NaN.
    finite = (total(w) + total(q) + size) * 0.0 == 0.0
    return tl.where(finite, residual, float("nan")), tl.where(finite, status, NONFINITE)
