"""What everything else of a layer grows from: the tokens' projections and the two pyramids."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maha_attn.layers.projection import autocast, plain_weights, project
from maha_attn.layers.pyramid import ScalePyramid, zero_beyond
from maha_attn.ops.backend import use_triton


def stem(
    x: Tensor, modules: Sequence[nn.Module], pyramid: ScalePyramid, lengths: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Project the tokens, and build the pyramids of tokens and values.

    By kernels, the gradients that tokens and values get from projections, attention and pyramid are
    summed where they are made; autograd would add them by passes of their own.

    Args:
        x: ``[B, N, D]``, zero beyond a row's length.
        modules: Projections of ``x``; the first makes the values.
        pyramid: The layer's.
        lengths: Real tokens of each row, ``[B]``.

    Returns:
        The projections; ``[X_0, X_1, …]``; ``[V_0, V_1, …]``.
    """
    spec, weights = pyramid.spec, plain_weights(modules)
    kernels = spec.downsample in ("conv", "mean") and spec.num_scales > 1
    if weights is not None and kernels and use_triton(spec.backend, x):
        inputs = [autocast(t) for t in (x, *weights)]
        options = (len(weights), spec.num_scales - 1, spec.ratio, spec.causal)
        results = _Stem.apply(None if spec.causal else lengths, options, *inputs, *pyramid.down)
        assert isinstance(results, tuple)
        projected, built = list(results[: len(weights)]), list(results[len(weights) :])
        levels = len(built) // 2
        return projected, [inputs[0], *built[:levels]], [projected[0], *built[levels:]]
    projected = project(x, modules)
    base = projected[0] if lengths is None else zero_beyond(projected[0], lengths)
    scales, values = pyramid.scales([x, base], lengths)
    return projected, scales, values


class _Stem(torch.autograd.Function):
    """`stem`; ``x̄ = D̄(X̄_1, …) + Σ ȳ_i W_i``, each product added to the sum before it."""

    @staticmethod
    def forward(lengths, options, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        from maha_attn.ops.triton.pyramid import build_scales

        count, steps, ratio, causal = options
        projected = [F.linear(x, weight) for weight in weights[:count]]
        operators = [weight.contiguous() for weight in weights[count:]]
        streams = [x, projected[0]]
        return *projected, *build_scales(streams, operators, lengths, steps, ratio, causal)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        lengths, ctx.options, x, *weights = inputs
        count = ctx.options[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, x, *weights, output[0], *output[count:])

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        from maha_attn.ops.triton.pyramid import build_backward

        count, _, ratio, _ = ctx.options
        lengths, x, *saved = ctx.saved_tensors
        levels = (len(grads) - count) // 2
        weights, (base, *built) = saved[: len(saved) - 1 - 2 * levels], saved[-1 - 2 * levels :]
        direct = [None, *grads[count : count + levels], grads[0], *grads[count + levels :]]
        dx, dbase, *doperators = build_backward(
            direct, [x, base], built, weights[count:], lengths, ratio
        )
        tokens, dtokens, dweights = x.flatten(0, -2), dx.flatten(0, -2), []
        for grad, weight in zip((dbase, *grads[1:count]), weights[:count], strict=True):
            dweights.append(None)
            if grad is not None:
                grad = grad.flatten(0, -2)
                dtokens.addmm_(grad, weight)
                dweights[-1] = grad.mT @ tokens
        return None, None, dx, *dweights, *doperators
