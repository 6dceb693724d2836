"""An operator gives the same past the dispatcher as through it, and is seen by who looks."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

pytest.importorskip("triton")
from maha_attn.ops.triton import operator as module
from maha_attn.ops.triton.operator import operator

calls: list[str] = []


@operator("maha_test::scaled")
def scaled(xs: Sequence[Tensor], factor: Tensor | None, power: int) -> list[Tensor]:
    calls.append("forward")
    factor = xs[0].new_ones(()) if factor is None else factor
    return [factor * x**power for x in xs]


@operator("maha_test::scaled_backward")
def scaled_backward(
    grads: Sequence[Tensor | None], xs: Sequence[Tensor], factor: Tensor | None, power: int
) -> list[Tensor]:
    calls.append("backward")
    scale = power if factor is None else power * factor
    pairs = list(zip(grads, xs, strict=True))
    dxs = [torch.zeros_like(x) if g is None else g * scale * x ** (power - 1) for g, x in pairs]
    dfactor = sum(((g * x**power).sum() for g, x in pairs if g is not None), xs[0].new_zeros(()))
    return [*dxs, dfactor]


@scaled.register_fake
def _(xs, factor, power):
    return [torch.empty_like(x) for x in xs]


@scaled_backward.register_fake
def _(grads, xs, factor, power):
    return [*(torch.empty_like(x) for x in xs), xs[0].new_empty(())]


def save(ctx, inputs, output) -> None:
    xs, factor, ctx.power = inputs
    ctx.set_materialize_grads(False)
    ctx.wanted = factor is not None and factor.requires_grad
    ctx.save_for_backward(factor, *xs)


def differentiate(ctx, grads):
    factor, *xs = ctx.saved_tensors
    *dxs, dfactor = scaled_backward(grads, xs, factor, ctx.power)
    return dxs, dfactor if ctx.wanted else None, None


scaled.register_autograd(differentiate, save=save)


@register_flop_formula(torch.ops.maha_test.scaled, get_raw=True)
def _forward_flops(xs, factor, power, out_val=None, **_) -> int:
    return 1


@register_flop_formula(torch.ops.maha_test.scaled_backward, get_raw=True)
def _backward_flops(grads, xs, factor, power, out_val=None, **_) -> int:
    return 10


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """Names of the operators that were called through the dispatcher."""
    seen: list[str] = []
    for op in (scaled, scaled_backward):
        through = op.dispatched

        def note(*arguments, through=through):
            seen.append(through.name())
            return through(*arguments)

        monkeypatch.setattr(op, "dispatched", note)
    return seen


def inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    xs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return xs, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def results(call, xs, factor) -> list[Tensor]:
    ys = call(xs, factor, 3)
    wanted = [t for t in (*xs, factor) if t is not None]
    return [*ys, *torch.autograd.grad(ys[0].sum() + ys[1].square().sum(), wanted)]


@pytest.mark.parametrize("has_factor", [True, False])
def test_past_the_dispatcher_as_through_it(has_factor, dispatched):
    xs, factor = inputs()
    factor = factor if has_factor else None
    straight = results(scaled, xs, factor)
    assert dispatched == []
    for a, b in zip(straight, results(torch.ops.maha_test.scaled, xs, factor), strict=True):
        assert torch.equal(a, b)


def test_an_output_without_a_gradient_and_one_that_nobody_wants():
    xs, _ = inputs()
    ys = scaled(xs, torch.tensor(2.0), 3)
    first, second = torch.autograd.grad(ys[1].sum(), xs)
    assert not first.any()
    torch.testing.assert_close(second, 6 * xs[1] ** 2)


def test_without_gradients_nothing_is_saved():
    xs, factor = inputs()
    with torch.no_grad():
        assert not scaled(xs, factor, 3)[0].requires_grad
    with torch.inference_mode():
        assert scaled([x.detach() for x in xs], None, 3)[0].is_inference()
    assert not scaled([x.detach() for x in xs], None, 3)[0].requires_grad


@pytest.mark.parametrize(
    "differentiate_again", [lambda y, x: y.backward(), lambda y, x: torch.autograd.grad(y, x)]
)
def test_a_second_derivative_is_refused(differentiate_again):
    xs, factor = inputs()
    loss = scaled(xs, factor, 3)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, xs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        differentiate_again(gradient.sum(), xs[:1])


def test_counters_see_it_forward_and_backward(dispatched):
    xs, factor = inputs()
    with FlopCounterMode(display=False) as counter:
        ys = scaled(xs, factor, 3)
        assert counter.get_total_flops() == 1
        ys[0].sum().backward()
    assert counter.get_total_flops() == 11
    assert dispatched == ["maha_test::scaled", "maha_test::scaled_backward"]


def test_subclasses_of_tensors_are_dispatched(dispatched):
    class Marked(Tensor):
        pass

    xs, _ = inputs()
    scaled([xs[0].detach().as_subclass(Marked), xs[1].detach()], None, 3)
    scaled([nn.Parameter(x.detach()) for x in xs], None, 3)
    assert dispatched == ["maha_test::scaled"]


def test_compiled_in_one_graph():
    xs, factor = inputs()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, xs, factor), results(scaled, xs, factor), strict=True):
        torch.testing.assert_close(a, b)


def test_contract():
    xs, factor = inputs()
    torch.library.opcheck(torch.ops.maha_test.scaled.default, (xs, factor, 3))


def test_arguments_are_put_back_as_they_were():
    arguments = [[1, 2], None, [], "a", [None]]
    layout, flat = module._layout(arguments), module._flat(arguments)
    assert layout == [2, None, 0, None, 1]
    assert flat == [1, 2, None, "a", None]
    assert module._nested(flat, layout) == arguments
