"""The pyramid of scales: downsampling, upsampling, and which scale is available where.

Letters: ``B`` rows, ``N`` tokens, ``D`` channels, ``r`` ratio, ``k`` taps; formulation §1 and §3.
A coarse token ``j`` ends with the fine token ``r·j + r - 1``: its taps reach ``k - r`` tokens
before its block and never a later one, so that every scale is causal by construction.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.ops.backend import use_triton


def coarse_length(length: int, ratio: int, *, causal: bool) -> int:
    """Tokens of the next scale: complete blocks only (causal), or the last partial one as well."""
    return length // ratio if causal else -(-length // ratio)


def combine(windows: Tensor, weight: Tensor | None, method: str) -> Tensor:
    """One token out of each window of finer tokens.

    Args:
        windows: ``[..., D, k]``, the taps last and in time order.
        weight: ``[k, D]`` for ``conv``, ``[D, D, k]`` for ``dense_conv``, else None.
        method: ``conv``, ``dense_conv``, ``max`` or ``mean``.

    Returns:
        ``[..., D]``.
    """
    if method == "mean":
        return windows.mean(-1)
    if method == "max":
        return windows.amax(-1)
    assert weight is not None
    if method == "dense_conv":
        return torch.einsum("...dk,edk->...e", windows, weight)
    token = windows[..., 0] * weight[0]
    for i in range(1, weight.shape[0]):
        token.addcmul_(windows[..., i], weight[i])
    return token


def build(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    steps: int,
    ratio: int,
    method: str,
    causal: bool,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> list[list[Tensor]]:
    """The pyramid of each stream of tokens, all by the same operators (paper Eq. 5).

    Args:
        streams: ``[B, N, D]`` each, zero at the tokens beyond a row's length.
        weights: One operator a step, as in `combine`, in any dtype: a scale has its stream's. None
            for ``max`` and ``mean``.
        steps: Scales beyond the first, as far as the length allows.
        ratio, method, causal, lengths: As in `downsample`; ``lengths`` of the first scale.
        backend: ``auto``, ``torch`` or ``triton`` (`maha_attn.ops.backend.use_triton`); ``conv``
            and ``mean`` have a kernel, and all steps of all streams are one operator.

    Returns:
        Per stream ``[X_0, X_1, …]``.
    """
    if steps and use_triton(backend, *streams, limit=kernel_limit(method)):
        from maha_attn.ops.triton import pyramid as kernels

        return kernels.build(
            streams, weights, steps=steps, ratio=ratio, causal=causal, lengths=lengths
        )
    pyramids = []
    for x in streams:
        scales, ends = [x], lengths
        for step in range(steps):
            weight = weights[step].to(x.dtype) if weights else None
            coarser = downsample(
                scales[-1], weight, ratio=ratio, method=method, causal=causal, lengths=ends
            )
            if coarser.shape[1] == 0:
                break
            scales.append(coarser)
            ends = None if ends is None or causal else -(-ends // ratio)
        pyramids.append(scales)
    return pyramids


def kernel_limit(method: str) -> str | None:
    """Why the pyramid's kernel cannot serve ``method``; None where it can."""
    served = method in ("conv", "mean")
    return None if served else f"the pyramid's kernel has no downsample={method!r}"


def downsample(
    x: Tensor,
    weight: Tensor | None,
    *,
    ratio: int,
    method: str,
    causal: bool,
    lengths: Tensor | None = None,
) -> Tensor:
    """The next scale: ``X_{s+1} = D(X_s)`` (paper Eq. 5).

    Args:
        x: ``[B, N, D]``, zero at the tokens beyond a row's length.
        weight: As in `combine`.
        ratio: ``r``.
        method: ``conv``, ``dense_conv``, ``max`` or ``mean``.
        causal: Complete blocks only. Otherwise the last partial block counts, over its real tokens.
        lengths: ``[B]`` real tokens of each row at this scale; None where all are real.
            Bidirectional only: a causal block of real tokens contains no padding.

    Returns:
        ``[B, N', D]``, ``N' = coarse_length(N)``. Bidirectional, tokens beyond a row's coarse
        length are zero.
    """
    length = x.shape[1]
    coarse = coarse_length(length, ratio, causal=causal)
    if coarse == 0:
        return x[:, :0]
    if method == "conv":
        assert weight is not None
        y = _strided_convolution(x, weight, ratio, coarse)
    else:
        if method == "max" and not causal:
            x = x.masked_fill(_beyond(length, lengths, x), -torch.inf)
        missing = max(coarse * ratio - length, 0)
        before = 0 if weight is None else weight.shape[2] - ratio
        padded = F.pad(x, (0, 0, before, missing), value=-torch.inf if method == "max" else 0.0)
        y = combine(padded.unfold(1, before + ratio, ratio)[:, :coarse], weight, method)
    if causal:
        return y
    if method == "mean":  # Over the real tokens of each block, not all of it.
        starts = torch.arange(coarse, device=x.device) * ratio
        ends = starts.new_full((1,), length) if lengths is None else lengths
        real = (ends[:, None] - starts).clamp(1, ratio)[..., None]
        return y * (ratio / real.to(y.dtype))
    return y if lengths is None else y.masked_fill(_beyond(coarse, -(-lengths // ratio), y), 0)


def _strided_convolution(x: Tensor, weight: Tensor, ratio: int, coarse: int) -> Tensor:
    """``y_j = Σ_i w_i ⊙ x_{rj + r - k + i}``, tap by tap in place, without a padded copy of x."""
    before = weight.shape[0] - ratio
    y = x[:, ::ratio][:, :coarse] * weight[before]
    for i, tap in enumerate(weight):
        if i == before:
            continue
        first = max(-((i - before) // ratio), 0)  # the first coarse token that has this tap
        tokens = x[:, ratio * first + i - before :: ratio][:, : coarse - first]
        y[:, first : first + tokens.shape[1]].addcmul_(tokens, tap)
    return y


def upsample(y: Tensor, *, stride: int, length: int, causal: bool) -> Tensor:
    """Nearest-neighbour upsampling along dimension -2 (paper IV-D), by ``stride`` to ``length``.

    Bidirectional: position ``t`` takes block ``⌊t/stride⌋``. Causal: the last complete block,
    ``⌊(t+1)/stride⌋ - 1``; zero before the first.
    """
    if stride == 1:
        return y
    y = y.repeat_interleave(stride, -2)
    if causal:
        y = F.pad(y, (0, 0, stride - 1, 0))
    return y[..., :length, :]


def availability(
    strides: tuple[int, ...], length: int, *, causal: bool, device: torch.device
) -> Tensor:
    """``[N, S]`` bool: has scale ``s`` a block that position ``t`` may see?"""
    ends = torch.arange(1, length + 1, device=device)[:, None]
    needed = torch.tensor(strides, device=device)
    return ends >= needed if causal else (ends > 0).expand(length, len(strides))


def dilated_convolution(
    x: Tensor, weight: Tensor, *, dilation: int, causal: bool, context: Tensor | None = None
) -> Tensor:
    """``ReLU(Σ_i w_i ⊙ x_{t - (k-1-i)·dilation})``, depthwise (paper IV-D).

    Args:
        x: ``[B, N, D]``.
        weight: ``[k, D]``.
        dilation: Distance between taps.
        causal: Taps end at ``t``; otherwise they are centred on it.
        context: ``[B, (k-1)·dilation, D]``, the tokens before ``x``; zeros when None.

    Returns:
        ``[B, N, D]``.
    """
    if x.shape[1] == 0:
        return x
    reach = (weight.shape[0] - 1) * dilation
    if context is not None:
        x = torch.cat((context, x), 1)
    else:
        x = F.pad(x, (0, 0, reach, 0) if causal else (0, 0, reach // 2, reach - reach // 2))
    return combine(x.unfold(1, reach + 1, 1)[..., ::dilation], weight, "conv").relu()


def _beyond(length: int, lengths: Tensor | None, like: Tensor) -> Tensor:
    """``[B, N, 1]`` bool: is the token beyond its row's length?"""
    index = torch.arange(length, device=like.device)
    ends = torch.full((1,), length, device=like.device) if lengths is None else lengths
    return (index >= ends[:, None])[..., None]
