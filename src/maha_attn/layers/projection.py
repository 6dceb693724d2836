"""Several projections of the same tokens: one pass over their gradient."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as anywhere

from maha_attn.ops.rotary import in_pairs


def project(
    x: Tensor,
    modules: Sequence[nn.Module] = (),
    *,
    heads: Sequence[nn.Module] = (),
    paired: int | None = None,
) -> list[Tensor]:
    """``[module(x) for module in [*modules, *heads]]``, with a cheaper gradient for ``x``.

    Autograd adds the gradients that ``x`` gets from each module by passes of their own; where all
    are plain linear layers without bias, each product is added to the sum before it as it is made.
    Anything else (a bias, an adapter, a hook) is called as it is.

    Args:
        x: ``[B, N, D]``.
        modules, heads: Projections.
        paired: Head width ``K``: results of ``heads`` are put into the paired layout of
            `maha_attn.ops.rotary`, by a copy of the weights where they are plain.
    """
    first = len(modules)
    modules = [*modules, *heads]
    weights = plain_weights(modules)
    if weights is None or (len(modules) < 2 and paired is None):
        results = [module(x) for module in modules]
        if paired is not None:
            results[first:] = (in_pairs(y, paired, -1) for y in results[first:])
        return results
    if paired is not None:
        weights[first:] = (in_pairs(weight, paired, 0) for weight in weights[first:])
    return list(_Project.apply(*map(autocast, (x, *weights))))  # pyright: ignore


def plain_weights(modules: Sequence[nn.Module]) -> list[Tensor] | None:
    """The modules' weights, if calling each does nothing but ``xWᵀ``.

    None also where the layer is being compiled: the compiler fuses sums by itself. And under
    torch.func's transforms, which do not know our derivatives.
    """
    weights = [m.weight for m in modules if is_plain(m) and m.bias is None]
    known = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    return weights if known and len(weights) == len(modules) else None


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast, where it is on, gives to a projection's operands."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if under_autocast(x) else x


def under_autocast(x: Tensor) -> bool:
    """Whether a projection of ``x`` has its operands' dtype chosen by autocast."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta":  # Which has no autocast to ask for.
        return False
    return torch.is_autocast_enabled(device)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Does calling ``module`` do nothing but ``xWᵀ + b``?"""
    own = module._forward_hooks or module._forward_pre_hooks
    own = own or module._backward_hooks or module._backward_pre_hooks
    every = anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks
    every = every or anywhere._global_backward_hooks or anywhere._global_backward_pre_hooks
    return type(module) is nn.Linear and not own and not every and "forward" not in vars(module)


class _Project(torch.autograd.Function):
    """``(xW_1ᵀ, xW_2ᵀ, …)``; ``x̄ = Σ ȳ_i W_i`` summed by the products themselves."""

    # No setup_context: with one, autograd looks the signature up at every call.
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        dx, dweights = product_gradients(x, weights, grads, ctx.needs_input_grad)
        return None if dx is None else dx.view_as(x), *dweights


def product_gradients(
    x: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``Σ ȳ_i W_i`` ``[tokens, D]`` and every ``ȳ_iᵀx``, for ``(xW_1ᵀ, xW_2ᵀ, …)``.

    ``needed``: of ``x``, then of each weight; what is not needed costs no product. Each product is
    added to the sum before it, the first to ``dx`` (in place), where there is one.
    """
    tokens, dweights = x.flatten(0, -2), []
    for weight, grad, need in zip(weights, grads, needed[1:], strict=True):
        grad = None if grad is None else grad.flatten(0, -2)
        if grad is not None and needed[0]:
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        dweights.append(grad.mT @ tokens if grad is not None and need else None)
    return dx, dweights
