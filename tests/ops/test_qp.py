"""The exact QP solver: optimality, agreement, isolation of bad problems, gradients, compilation."""

import copy

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maha_attn.bench.qp import KINDS, SETTINGS, kkt_residual, random_problems
from maha_attn.ops.qp import CONSTRAINTS, Status, nash_conv, solve_qp
from maha_attn.ops.reference_qp import solve_qp_by_enumeration

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
SMOOTH = [("simplex", 1.0), ("capped", 1.0), ("simplex", 0.1), ("capped", 0.1)]
EVERY = [("simplex", 0.0), ("capped", 0.0), ("box", 0.0), *SMOOTH]


def problems(kind="gram", P=64, S=4, dtype=torch.float64, seed=0):
    return random_problems(kind, P, S, dtype, torch.Generator().manual_seed(seed))


def assert_feasible(w, constraint, dtype):
    assert (w >= 0).all()
    total = w.double().sum(-1)
    slack = 2e-7 if dtype == torch.float32 else 1e-15
    if constraint == "simplex":
        assert (total - 1).abs().max() <= slack
    elif constraint == "capped":
        assert total.max() <= 1 + slack
    else:
        assert (w <= 1).all()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("constraint", "temperature"), SETTINGS)
def test_optimality_conditions_hold_on_random_problems(kind, constraint, temperature, dtype):
    for S in range(2, 9):
        M, q = problems(kind, 2000, S, dtype, seed=S)
        solution = solve_qp(M, q, constraint, temperature)
        size = 1 + q.abs().amax(-1)
        residual = kkt_residual(M, q, solution.weights, constraint, temperature)
        assert (residual / size).max() <= LIMIT[dtype]
        assert (solution.residual / size).max() <= LIMIT[dtype]
        assert (solution.status == Status.SOLVED).all()
        assert solution.gap.abs().max() <= 30 * LIMIT[dtype] * size.max()
        assert_feasible(solution.weights, constraint, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("constraint", "temperature"), SETTINGS)
def test_weights_are_as_good_without_a_certificate(kind, constraint, temperature):
    for S in (2, 4, 8):
        M, q = problems(kind, 5000, S, torch.float32, seed=S)
        weights = solve_qp(M, q, constraint, temperature, certified=False).weights
        residual = kkt_residual(M, q, weights, constraint, temperature)
        assert (residual / (1 + q.abs().amax(-1))).max() <= LIMIT[torch.float32]
        assert_feasible(weights, constraint, torch.float32)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("constraint", ["simplex", "capped"])
@pytest.mark.parametrize("dtype", LIMIT)
def test_smooth_problems_converge_at_any_scale(constraint, temperature, dtype):
    for S in (1, 2, 5, 8):
        M, q = problems("duplicates", 500, S, dtype, seed=S)
        size = torch.linspace(0.1, 50, 500, dtype=dtype)[:, None]
        q = q / q.abs().amax(-1, keepdim=True).clamp(min=0.1) * size
        solution = solve_qp(M, q, constraint, temperature)
        assert (solution.status == Status.SOLVED).all()
        residual = kkt_residual(M, q, solution.weights, constraint, temperature)
        assert (residual / (1 + q.abs().amax(-1))).max() <= LIMIT[dtype]
        assert_feasible(solution.weights, constraint, dtype)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_enumeration_of_active_sets(constraint, kind):
    for S in (1, 2, 4):
        M, q = problems(kind, 20, S, seed=S)
        w = solve_qp(M, q, constraint).weights
        for i in range(len(w)):
            reference = solve_qp_by_enumeration(M[i], q[i], constraint)
            gradient_gap = (M[i] @ (w[i] - reference)).abs().max()
            assert gradient_gap <= 1e-9
            if kind != "conditioned":
                torch.testing.assert_close(w[i], reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
def test_agrees_with_scipy(constraint, temperature):
    M, q = problems("gram", 20, 5, seed=7)
    w = solve_qp(M, q, constraint, temperature).weights
    sums = {
        "simplex": [{"type": "eq", "fun": lambda w: w.sum() - 1}],
        "capped": [{"type": "ineq", "fun": lambda w: 1 - w.sum()}],
        "box": [],
    }[constraint]
    for A, b, found in zip(M.numpy(), q.numpy(), w.numpy(), strict=True):

        def objective(w, A=A, b=b):
            w = np.maximum(w, 1e-300)
            return 0.5 * w @ A @ w - b @ w + temperature * (w * np.log(w)).sum()

        answer = scipy.optimize.minimize(
            objective,
            np.full(5, 0.19),
            method="SLSQP",
            bounds=[(0, 1)] * 5,
            constraints=sums,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert objective(found) <= answer.fun + 1e-10
        np.testing.assert_allclose(found, answer.x, atol=2e-4)


@pytest.mark.parametrize("dtype", LIMIT)
def test_box_solution_is_the_games_equilibrium(dtype):
    generator = torch.Generator().manual_seed(3)
    ridge, sparsity, K = 0.01, 0.05, 16
    for S in (2, 4, 8):
        u = torch.randn(60, S, K, dtype=torch.float64, generator=generator)
        u[::3, 1] = u[::3, 0]
        gram = (u @ u.mT / K**0.5).to(dtype)
        M = gram + ridge * torch.eye(S, dtype=dtype)
        q = gram.diagonal(dim1=-2, dim2=-1) - sparsity
        w = solve_qp(M, q, "box").weights.double()

        def costs(w, u=u):
            distance = (u - (w[..., None, :] @ u)).square().sum(-1) / K**0.5
            return 0.5 * distance + sparsity * w + 0.5 * ridge * w**2

        total = torch.zeros(60, dtype=torch.float64)
        for s in range(S):
            deviations = w[:, None].repeat(1, 201, 1)
            deviations[..., s] = torch.linspace(0, 1, 201, dtype=torch.float64)
            best = costs(deviations, u[:, None])[..., s].amin(-1)
            regret = costs(w)[:, s] - best
            assert regret.max() <= LIMIT[dtype]
            total += regret.clamp(min=0)
        exact = nash_conv(u @ u.mT / K**0.5, w, ridge, sparsity)
        assert exact.max() <= S * LIMIT[dtype]
        assert (exact >= total - 1e-12).all()


def test_nash_conv_sees_a_profile_that_is_no_equilibrium():
    gram = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    # Alone, a player moves from 0 to its best response G/(G + ρ) and gains ½G²/(G + ρ).
    gain = 0.5 * (4 / 2.5 + 9 / 3.5)
    found = nash_conv(gram, torch.zeros(2), ridge=0.5)
    torch.testing.assert_close(found, torch.tensor(gain, dtype=torch.float64))


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
@pytest.mark.parametrize("P", [5, 300])
def test_bad_problems_are_reported_and_leave_the_others_alone(constraint, temperature, P):
    M, q = problems("gram", P, 4)
    clean = solve_qp(M, q, constraint, temperature)
    M[1, 2, 2], q[2, 0], M[3, 1, 0] = torch.nan, torch.inf, -torch.inf
    M[4] = torch.ones(4, 4)
    spoilt = solve_qp(M, q, constraint, temperature)
    assert spoilt.status[:5].tolist() == [0, 3, 3, 3, 2]
    assert spoilt.weights[1:4].isnan().all()
    assert spoilt.weights[4].isfinite().all()
    assert spoilt.residual[4].isfinite()
    assert_feasible(spoilt.weights[4], constraint, torch.float64)
    good = torch.ones(P, dtype=torch.bool)
    good[1:5] = False
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[good], after[good])


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
@pytest.mark.parametrize("dtype", LIMIT)
def test_singular_problems_are_reported(constraint, temperature, dtype):
    u = torch.randn(3, 5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0]))
    cases = [torch.zeros(5, 5), torch.ones(5, 5), indefinite, *(u @ u.mT)]
    M = torch.stack([case.to(dtype) for case in cases])
    q = torch.linspace(-1, 1, 5, dtype=dtype).expand(len(M), 5).clone().requires_grad_()
    M.requires_grad_()
    solution = solve_qp(M, q, constraint, temperature)
    assert (solution.status == Status.SINGULAR).all()
    assert_feasible(solution.weights, constraint, dtype)
    gradients = torch.autograd.grad(solution.weights.square().sum(), (M, q))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
def test_gradcheck(constraint, temperature):
    for S in (1, 4):
        M, q = problems("gram", 3, S, seed=S + 20)
        M, q = M.requires_grad_(), q.requires_grad_()

        def weights(M, q):
            return solve_qp(M, q, constraint, temperature).weights

        assert torch.autograd.gradcheck(weights, (M, q), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
@pytest.mark.parametrize("kind", ["ties", "duplicates", "conditioned"])
@pytest.mark.parametrize("dtype", LIMIT)
def test_gradients_are_finite_at_kinks(constraint, temperature, kind, dtype):
    M, q = problems(kind, 2000, 6, dtype)
    M, q = M.requires_grad_(), q.requires_grad_()
    w = solve_qp(M, q, constraint, temperature).weights
    M_grad, q_grad = torch.autograd.grad((w * torch.arange(6)).sum(), (M, q))
    assert M_grad.isfinite().all()
    assert q_grad.isfinite().all()
    if constraint == "simplex":
        assert q_grad.double().sum(-1).abs().max() <= 1e-6 * (1 + q_grad.abs().max())


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
def test_identical_scales_share_equally(constraint, temperature):
    u = torch.randn(200, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u[:, 3] = u[:, 1]
    M = u @ u.mT + 0.01 * torch.eye(4)
    q = (u @ u[:, :1].mT)[..., 0] * 1.5
    w = solve_qp(M, q, constraint, temperature).weights
    torch.testing.assert_close(w[:, 1], w[:, 3], atol=1e-10, rtol=0)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
def test_unavailable_scales_are_as_if_absent(constraint, temperature):
    M, q = problems("gram", 64, 5)
    available = torch.rand(64, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    available[0] = False
    poisoned_M = M.masked_fill(~(available[:, :, None] & available[:, None]), torch.nan)
    poisoned_q = q.masked_fill(~available, torch.inf)
    leaves = poisoned_M.requires_grad_(), poisoned_q.requires_grad_()
    solution = solve_qp(*leaves, constraint, temperature, available)
    weight_grad = torch.randn(
        64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    M_grad, q_grad = torch.autograd.grad(solution.weights, leaves, weight_grad)
    assert (solution.status == Status.SOLVED).all()
    assert (solution.weights[~available] == 0).all()
    assert (q_grad[~available] == 0).all()
    assert (M_grad[~(available[:, :, None] & available[:, None])] == 0).all()
    assert (solution.residual[0], solution.gap[0]) == (0, 0)
    for i in range(1, 64):
        on = available[i]
        if not on.any():
            continue
        A, b = M[i][on][:, on].requires_grad_(), q[i][on].requires_grad_()
        alone = solve_qp(A, b, constraint, temperature)
        torch.testing.assert_close(solution.weights[i][on], alone.weights, atol=1e-11, rtol=0)
        A_grad, b_grad = torch.autograd.grad(alone.weights, (A, b), weight_grad[i][on])
        torch.testing.assert_close(q_grad[i][on], b_grad, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(M_grad[i][on][:, on], A_grad, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY)
def test_batch_shapes_broadcast_and_strides(constraint, temperature):
    M, q = problems("gram", 24, 3)
    flat = solve_qp(M, q, constraint, temperature)
    shaped = solve_qp(M.view(2, 3, 4, 3, 3), q.view(2, 3, 4, 3), constraint, temperature)
    assert shaped.weights.shape == (2, 3, 4, 3)
    assert shaped.status.dtype == torch.int8
    for one, other in zip(flat, shaped, strict=True):
        assert torch.equal(one, other.reshape(one.shape))
    M_strided = M.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    q_strided = torch.stack([q, q], -1)[..., 0]
    strided = solve_qp(M_strided, q_strided, constraint, temperature)
    assert torch.equal(strided.weights, flat.weights)
    single = solve_qp(M[0], q[0], constraint, temperature)
    assert single.residual.shape == ()
    torch.testing.assert_close(single.weights, flat.weights[0], atol=1e-13, rtol=0)
    broadcast = solve_qp(M[0], q, constraint, temperature, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(broadcast.weights[0], flat.weights[0], atol=1e-13, rtol=0)
    empty = solve_qp(M[:0], q[:0].requires_grad_(), constraint, temperature)
    assert empty.weights.shape == (0, 3)
    empty.weights.sum().backward()


def test_only_the_symmetric_part_counts():
    M, q = problems("gram", 16, 4)
    skew = torch.randn(16, 4, 4, dtype=torch.float64)
    found = solve_qp(M + skew - skew.mT, q).weights
    torch.testing.assert_close(found, solve_qp(M, q).weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_fp32(dtype):
    M, q = (x.to(dtype) for x in problems("gram", 16, 4))
    found = solve_qp(M, q, "simplex", 1.0)
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.weights, solve_qp(M.float(), q.float(), "simplex", 1.0).weights)


def test_one_scale_has_closed_forms():
    M, q = torch.tensor([[2.0]]), torch.tensor([[-1.0], [1.0], [5.0]])
    assert solve_qp(M, q).weights.flatten().tolist() == [1, 1, 1]
    assert solve_qp(M, q, "capped").weights.flatten().tolist() == [0, 0.5, 1]
    assert solve_qp(M, q, "box").weights.flatten().tolist() == [0, 0.5, 1]


@settings(deadline=None, max_examples=50)
@given(
    S=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    exponent=st.floats(-6, 6),
    constraint=st.sampled_from(CONSTRAINTS),
)
def test_solution_does_not_depend_on_units(S, seed, exponent, constraint):
    M, q = problems("gram", 4, S, seed=seed)
    unit = 10**exponent
    found = solve_qp(M * unit, q * unit, constraint)
    assert (found.status == Status.SOLVED).all()
    torch.testing.assert_close(
        found.weights, solve_qp(M, q, constraint).weights, atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"M": torch.eye(4)[:3]}, ValueError, r"M must be \[..., S, S\], got \(3, 4\)"),
        ({"M": torch.eye(9), "q": torch.ones(9)}, ValueError, "M must have 1 to 8 scales, got 9"),
        ({"q": torch.ones(3)}, ValueError, r"q must be \[..., 4\] as M is, got \(3,\)"),
        ({"M": torch.eye(4).expand(5, 4, 4), "q": torch.ones(3, 4)}, ValueError, "q's batch must"),
        ({"q": torch.ones(4, dtype=torch.int64)}, TypeError, "q must be floating, got torch.int64"),
        ({"M": [[1.0]]}, TypeError, "M must be a tensor, got list"),
        ({"q": torch.ones(4, device="meta")}, ValueError, "q must be on M's device cpu, got meta"),
        ({"constraint": "ball"}, ValueError, "constraint must be one of .* got 'ball'"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a float"),
        ({"temperature": 1.0, "constraint": "box"}, ValueError, "temperature must be 0 for"),
        ({"available": torch.ones(4)}, TypeError, "available must be a bool tensor, got"),
        ({"available": torch.ones(3) > 0}, ValueError, r"available must broadcast to \(4,\), got"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"M": torch.eye(4), "q": torch.ones(4), **change}
    with pytest.raises(error, match=message):
        solve_qp(**arguments)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY[:4])
def test_compiles_to_one_graph(constraint, temperature):
    available = torch.tensor([[True, True, False, True]])

    def loss(M, q):
        solution = solve_qp(M * 2, q, constraint, temperature, available)
        return (solution.weights * q).sum() + solution.residual.sum(), solution

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_leaves = [x.requires_grad_() for x in problems("gram", 8, 4)]
    compiled_leaves = copy.deepcopy(eager_leaves)
    eager_loss, eager = loss(*eager_leaves)
    compiled_loss, found = compiled(*compiled_leaves)
    for one, other in zip(eager, found, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    eager_loss.backward()
    compiled_loss.backward()
    for one, other in zip(eager_leaves, compiled_leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)


@pytest.mark.parametrize(("constraint", "temperature"), EVERY[:4])
def test_operators_follow_their_contract(constraint, temperature):
    M, q = (x.requires_grad_() for x in problems("gram", 8, 4))
    mask = torch.ones(8, 4, dtype=torch.bool)
    solve = torch.ops.maha_attn.qp_solve.default
    for available in (None, mask):
        torch.library.opcheck(solve, (M, q, available, constraint, temperature))
    w = solve_qp(M, q, constraint, temperature).weights.detach()
    arguments = (M.detach(), w, torch.randn_like(w), constraint, temperature)
    torch.library.opcheck(torch.ops.maha_attn.qp_adjoint.default, arguments)
