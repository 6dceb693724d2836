"""Rows of different lengths: what a layer asks of its input, and real tokens to the front and back.

Letters: ``B`` rows, ``N`` tokens, ``D`` width.
"""

import torch
from torch import Tensor


def check_tokens(x: Tensor, padding_mask: Tensor | None, width: int) -> None:
    """Check a layer's input ``x`` ``[B, N, width]`` and its mask ``[B, N]``.

    Raises:
        TypeError: ``x`` is no tensor or not floating point, or ``padding_mask`` is not boolean.
        ValueError: A shape is not as above, or ``N`` is 0.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x must have shape [B, N, {width}], got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one token, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; embed token ids first")
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise TypeError(
            f"padding_mask must be boolean (True = real token), got {padding_mask.dtype}; "
            "use mask.bool()"
        )
    if padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"padding_mask must have shape {list(x.shape[:2])} as x has, got "
            f"{list(padding_mask.shape)}"
        )


def to_front(x: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move the real tokens to the front of their rows, in order; zeros behind them.

    Returns:
        ``x`` ``[B, N, D]``, and ``places`` ``[B, N]``: where each token stands now; None where a
        row is one token.
    """
    x = torch.where(padding_mask[..., None], x, 0)
    if x.shape[1] == 1:
        return x, None
    order = torch.sort(~padding_mask, dim=1, stable=True).indices
    return _take(x, order), torch.argsort(order, dim=1)


def to_places(y: Tensor, places: Tensor | None, padding_mask: Tensor) -> Tensor:
    """Undo `to_front`; zeros at padding."""
    if places is not None:
        y = _take(y, places)
    return torch.where(padding_mask[..., None], y, 0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, n]]`` for ``x`` ``[B, N, D]``."""
    return torch.take_along_dim(x, index[..., None], 1)
