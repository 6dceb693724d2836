"""Rotary position embedding (Su et al., arXiv 2104.09864).

A head's features are turned in pairs. Half-split, as weights and caches have them, feature ``i``
goes with ``i + K/2``. Paired, it goes with the one beside it, and a rotation is one product of
complex numbers, a quarter of the time on a CPU. Attention is the same in either layout, as long as
queries and keys share it. Tables are real for the one and complex for the other.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from maha_attn.ops.backend import is_watched, use_triton


def rotary_table(
    positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cosines and signed sines of every angle ``p · θ^(-2i/K)``.

    Args:
        positions: ``[...]``, in tokens of the scale; fractions are allowed.
        head_dim: ``K``, even.
        theta: Base of the geometric frequencies.
        dtype: Of the angles and the table; fp32 keeps an angle at 64K tokens to 4e-3 rad.

    Returns:
        ``[..., 2, K]``: ``cos`` and ``(-sin, sin)``, each half repeated, so that a
        rotation is two multiplications and a swap of halves.
    """
    angles = _angles(positions, head_dim, theta, dtype)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos, -sin, sin), -1).unflatten(-1, (2, head_dim))


def paired_table(
    positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`rotary_table` of the paired layout: ``e^(ipθ^(-2i/K))``, complex ``[..., K/2]``."""
    angles = _angles(positions, head_dim, theta, dtype)
    return torch.polar(torch.ones_like(angles), angles)


def sequence_table(
    length: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stride: int = 1,
    paired: bool = False,
) -> Tensor:
    """The table of a sequence's first ``length`` tokens, as they stand at a scale.

    Token ``t`` stands at ``(t+1)/stride - 1``: the last token of a block where the block stands.

    All layers and steps need the same few tables, and a dozen kernels make one. So they are kept,
    made for the next power of 2 tokens up to 4096 and the next 4096 from there: the last 32, 8·K·N
    bytes each in fp32 (32 MiB for K = 64 and 64K tokens). Not kept is what is made while somebody
    listens (`is_watched`), or inside a CUDA graph, which would go on to read a table that was
    dropped meanwhile. A stream has its own, as nothing else says when a table is ready or no longer
    read; and so has inference mode.
    """
    options = (head_dim, theta, dtype, device, stride, paired)
    on_gpu = device.type == "cuda"
    if is_watched() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return _sequence_table(length, *options)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    step = min(1 << (max(length, 256) - 1).bit_length(), 4096)
    rounded = -(-length // step) * step
    return _kept_table(torch.is_inference_mode_enabled(), stream, rounded, *options)[:length]


def _sequence_table(
    length: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
    stride: int,
    paired: bool,
) -> Tensor:
    positions = torch.arange(1, length + 1, device=device).to(dtype) / stride - 1
    return (paired_table if paired else rotary_table)(positions, head_dim, theta, dtype)


@lru_cache(maxsize=32)
def _kept_table(inference: bool, stream: int, length: int, *options: Any) -> Tensor:
    """`_sequence_table`, for one mode and one stream."""
    return _sequence_table(length, *options)


def in_pairs(x: Tensor, head_dim: int, dim: int) -> Tensor:
    """From half-split to paired: the features, or a projection's rows, ``H·K`` along ``dim``."""
    dim %= x.dim()
    halves = x.unflatten(dim, (-1, 2, head_dim // 2))
    return halves.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def _angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    frequencies = rotary_frequencies(head_dim, theta, dtype, positions.device)
    return positions.to(dtype)[..., None] * frequencies


def rotary_frequencies(
    head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``θ^(-2i/K)``, ``[K/2]``."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype)
    return theta ** (-exponents / head_dim)


def rotate(x: Tensor, table: Tensor, backend: str = "auto") -> Tensor:
    """Rotate ``x`` ``[B, N, H, K]`` by ``table`` ``[N, 2, K]`` or ``[B, N, 2, K]``.

    Computed in fp32 (fp64 for fp64 input), returned in the dtype of ``x``. With a `paired_table`
    ``[N, K/2]``, ``x`` is paired and serves as memory for the result where it has no gradient.
    """
    if table.is_complex():
        wide = x.to(table.real.dtype).unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(wide)
        turns = table[:, None]
        turned = turned * turns if turned.requires_grad else turned.mul_(turns)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    if use_triton(backend, x, width=x.shape[-1]):
        from maha_attn.ops.triton.rotary import rotate_projection

        return rotate_projection(x[:, :, None], table)[0].transpose(1, 2)
    return _rotate_op(x, table)


@torch.library.custom_op("maha_attn::rotate", mutates_args=())
def _rotate_op(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table[..., None, :, :].unbind(-2)
    half = x.shape[-1] // 2
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, table.dtype), device=x.device)
    torch.mul(x, cos, out=y)  # In place from here on: no further tensor of this size.
    y[..., :half].addcmul_(x[..., half:], sin[..., :half])
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y.to(x.dtype)


@_rotate_op.register_fake
def _(x, table):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    """The derivative of a rotation is the rotation back."""
    (table,) = ctx.saved_tensors
    return _rotate_op(grad, table * table.new_tensor([[1.0], [-1.0]])), None


_rotate_op.register_autograd(_backward, setup_context=_setup_context)
