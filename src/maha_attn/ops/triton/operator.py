"""Operators for the dispatcher, called past it where nobody listens.

As a custom operator of PyTorch's, a function can be compiled, counted and traced. A call through
the dispatcher costs the host 0.2 ms and more, though, mostly for finding tensors in lists, and a
layer's step is seven such calls. So a call where nothing but autograd wants to know of it goes to
the function itself.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maha_attn.ops.backend import is_watched


class Operator:
    """A function of tensors, lists of tensors and options; differentiable once.

    Called with positional arguments alone; what can be differentiated returns a list or a tuple.

    Args:
        name: ``namespace::name``; ``torch.ops.namespace.name`` is the custom operator.
        run: Annotated as `torch.library.custom_op` wants it; it mutates nothing.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run = run
        self.definition = torch.library.custom_op(name, run, mutates_args=())
        self.register_fake = self.definition.register_fake
        namespace, _, plain = name.partition("::")
        self.dispatched = getattr(getattr(torch.ops, namespace), plain).default
        self.save: Callable[..., None] | None = None

    def register_autograd(
        self, differentiate: Callable[..., Any], *, save: Callable[..., None]
    ) -> None:
        """The derivative, as `torch.library.CustomOpDef.register_autograd` takes it.

        Both functions serve both ways: gradients of a list are a list (as result: or None), and
        what is wanted (``ctx.needs_input_grad``) is laid out differently, so ``save`` looks at
        ``requires_grad`` instead.
        """
        self.differentiate, self.save = differentiate, save
        self.definition.register_autograd(differentiate, setup_context=save)

    def __call__(self, *arguments: Any) -> Any:
        """Run, through the dispatcher if compilers, modes, transforms or subclasses want it."""
        if is_watched(flat := _flat(arguments)):
            return self.dispatched(*arguments)
        if not torch.is_grad_enabled():
            return self.run(*arguments)
        if self.save is None:  # The custom operator refuses to be differentiated.
            return self.dispatched(*arguments)
        result = _Differentiable.apply(self, _layout(arguments), *flat)
        return list(result)  # pyright: ignore[reportArgumentType]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an `Operator` of the decorated function."""
    return lambda run: Operator(name, run)


class _Differentiable(torch.autograd.Function):
    """An operator's arguments one by one, as autograd finds them."""

    # No setup_context: it would have the signature looked up at every call.
    @staticmethod
    def forward(ctx, op: Operator, layout: list[int | None], *flat: Any) -> tuple[Tensor, ...]:
        arguments, ctx.op, ctx.layout = _nested(flat, layout), op, layout
        result = op.run(*arguments)
        ctx.is_list = isinstance(result, list)
        assert op.save is not None
        op.save(ctx, arguments, result)
        return tuple(result)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        nested = ctx.op.differentiate(ctx, *([list(grads)] if ctx.is_list else grads))
        flat = []
        for gradient, count in zip(nested, ctx.layout, strict=True):
            if count is None:
                flat.append(gradient)
            else:
                flat += [None] * count if gradient is None else gradient
        return None, None, *flat


def _layout(arguments: Iterable[Any]) -> list[int | None]:
    """The lengths of lists, None for anything else."""
    return [len(a) if isinstance(a, (list, tuple)) else None for a in arguments]


def _flat(arguments: Iterable[Any]) -> list[Any]:
    """What is in lists, in their place."""
    flat = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            flat += argument
        else:
            flat.append(argument)
    return flat


def _nested(flat: Sequence[Any], layout: Iterable[int | None]) -> list[Any]:
    """The arguments that `_flat` took apart."""
    arguments, at = [], 0
    for count in layout:
        if count is None:
            arguments.append(flat[at])
        else:
            arguments.append(list(flat[at : at + count]))
        at += 1 if count is None else count
    return arguments
