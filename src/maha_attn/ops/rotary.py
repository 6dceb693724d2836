"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout."""

import torch
from torch import Tensor

from maha_attn.ops.backend import use_triton


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
    frequencies = rotary_frequencies(head_dim, theta, dtype, positions.device)
    angles = positions.to(dtype)[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos, -sin, sin), -1).unflatten(-1, (2, head_dim))


def rotary_frequencies(
    head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``θ^(-2i/K)``, ``[K/2]``."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype)
    return theta ** (-exponents / head_dim)


def rotate(x: Tensor, table: Tensor, backend: str = "auto") -> Tensor:
    """Rotate ``x`` ``[B, N, H, K]`` by ``table`` ``[N, 2, K]`` or ``[B, N, 2, K]``.

    Computed in fp32 (fp64 for fp64 input), returned in the dtype of ``x``.
    """
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
