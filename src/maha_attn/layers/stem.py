"""What everything else of a layer grows from: the tokens' projections and the two pyramids."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maha_attn.layers.projection import autocast, plain_weights, product_gradients, project
from maha_attn.layers.pyramid import ScalePyramid, zero_beyond
from maha_attn.ops.backend import use_triton


def stem(
    x: Tensor,
    modules: Sequence[nn.Module],
    others: Sequence[nn.Module],
    pyramid: ScalePyramid,
    lengths: Tensor | None,
    *,
    paired: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Project the tokens, and build the pyramids of tokens and values.

    By kernels, the gradients that tokens and values get from projections, attention and pyramid are
    summed where they are made; autograd would add them by passes of their own. And ``modules`` are
    one product: a gate of a few columns would cost a pass over the tokens for itself.

    Args:
        x: ``[B, N, D]``, zero beyond a row's length.
        modules: Projections of ``x`` whose results live until the backward pass; the first makes
            the values.
        others: Projections of ``x`` whose results don't.
        pyramid: The layer's.
        lengths: Real tokens of each row, ``[B]``.
        paired: Whether ``others`` make heads of that layout (`maha_attn.ops.rotary`).

    Returns:
        All projections; ``[X_0, X_1, …]``; ``[V_0, V_1, …]``.
    """
    spec, weights = pyramid.spec, plain_weights([*modules, *others])
    kernels = spec.downsample in ("conv", "mean") and spec.num_scales > 1 and not paired
    if weights is not None and kernels and use_triton(spec.backend, x):
        x, *weights = map(autocast, (x, *weights))
        options = (spec.num_scales - 1, spec.ratio, spec.causal)
        packed = torch.cat(weights[: len(modules)]) if len(modules) > 1 else weights[0]
        operands = (packed, *weights[len(modules) :])
        lengths = None if spec.causal else lengths
        results = _Stem.apply(lengths, x.shape[-1], options, x, len(operands), *operands,
                              *pyramid.down)  # fmt: skip
        assert isinstance(results, tuple)
        (base, *rest), built = results[: len(operands) + 1], list(results[len(operands) + 1 :])
        levels = len(built) // 2
        tails = rest[0].split([w.shape[0] for w in weights[1 : len(modules)]], -1)
        return (
            [base, *tails, *rest[1:]], [x, *built[:levels]], [base, *built[levels:]]
        )  # fmt: skip
    projected = project(x, modules, heads=others, paired=spec.head_dim if paired else None)
    base = projected[0] if lengths is None else zero_beyond(projected[0], lengths)
    scales, values = pyramid.scales([x, base], lengths)
    return projected, scales, values


class _Stem(torch.autograd.Function):
    """`stem`; ``x̄ = D̄(X̄_1, …) + Σ ȳ_i W_i``, each product added to the sum before it.

    The first operand's product is split: values of the given width, and what else it holds.
    """

    # No setup_context, as in `_Project`.
    @staticmethod
    def forward(
        ctx, lengths, width, options, x: Tensor, count, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        from maha_attn.ops.triton.pyramid import build_scales

        packed, *others = (F.linear(x, weight) for weight in weights[:count])
        base, tail = packed[..., :width], packed[..., width:]
        operators = [weight.contiguous() for weight in weights[count:]]
        built = build_scales([x, base], operators, lengths, *options)
        ctx.count, ctx.ratio = count, options[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, x, *weights, base, *built)
        return base, tail, *others, *built

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        from maha_attn.ops.triton.pyramid import backward_into

        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("the layer on kernels is differentiable once, not twice")
        lengths, x, *saved = ctx.saved_tensors
        dbase, dtail, *dothers = grads[: 1 + ctx.count]
        dscales = grads[1 + ctx.count :]
        levels = len(dscales) // 2
        split = len(saved) - 1 - 2 * levels
        weights, (base, *built) = saved[:split], saved[split:]
        dx = torch.empty_like(x)
        dpacked = x.new_empty(*x.shape[:-1], weights[0].shape[0])
        dvalues, rest = dpacked.split([base.shape[-1], dpacked.shape[-1] - base.shape[-1]], -1)
        if dtail is None:
            rest.zero_()
        else:
            rest.copy_(dtail)
        direct = [None, *dscales[:levels], dbase, *dscales[levels:]]
        doperators = backward_into(
            [dx, dvalues], direct, [x, base], built, weights[ctx.count :], lengths, ctx.ratio
        )
        needed = (True, *ctx.needs_input_grad[5 : 5 + ctx.count])
        _, dweights = product_gradients(
            x, weights[: ctx.count], (dpacked, *dothers), needed, dx.flatten(0, -2)
        )
        return None, None, None, dx, None, *dweights, *doperators
