"""Attention of one scale, full or windowed, for queries of its own or of a finer resolution.

``O = softmax(QKᵀ/√K + mask) V`` (paper Eq. 6; formulation §2). A windowed scale never builds the
``N × N`` matrix: queries are cut into blocks, and each block sees the one strip of keys that its
window can reach.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maha_attn.ops.backend import use_triton

BLOCK = 32
"""Queries to a block of a windowed scale; few, since each executes as many keys too many."""


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    stride: int = 1,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every query to the visible keys of one scale.

    With ``e_i`` the key block of query ``i``, key ``j`` is visible where, causal,
    ``e_i = ⌊(i+1)/stride⌋ - 1`` (the last block complete at ``i``) and ``0 ≤ e_i - j < window``;
    bidirectional, ``e_i = ⌊i/stride⌋`` and ``|e_i - j| ≤ window/2``.

    Args:
        q: ``[B, H, N, K]``.
        k, v: ``[B, H, N_k, K]`` with ``N_k = ⌊N/stride⌋`` (causal) or ``⌈N/stride⌉``. Any strides.
        window: Tokens of the keys' scale; None: full.
        causal: See above.
        stride: Queries to a key: 1 for the scale's own (coarse) queries, ``r^s`` for fine ones.
        lengths: ``[B]`` real keys of each row (bidirectional; a row of none attends to key 0).
            Causal rows need none: padding lies in their future.
        backend: ``auto``, ``torch`` or ``triton`` (`maha_attn.ops.backend.use_triton`).

    Returns:
        ``[B, H, N, K]``; zeros where a query sees no key (before the first complete block).

    Numerics: `torch.nn.functional.scaled_dot_product_attention`. Cost: ``4K`` FLOPs a query and
    executed key; a window of 128 executes 160 keys a query.
    """
    if use_triton(backend, q, k, v, width=q.shape[-1]):
        from maha_attn.ops.triton import scale_attention as kernels

        return kernels.scale_attention(
            q, k, v, window=window, causal=causal, stride=stride, lengths=lengths
        )
    if stride == 1:
        return _aligned_attention(q, k, v, window, causal, lengths)
    # The queries whose last block is e are `stride` in a row: each of the `stride` positions in
    # that run is one more head over the same keys, and the runs are aligned with the keys.
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_keys == 0:
        return torch.zeros_like(q)
    first = stride - 1 if causal else 0
    runs = F.pad(q, (0, 0, -first, num_keys * stride - (num_queries - first)))
    runs = runs.unflatten(2, (num_keys, stride)).transpose(2, 3).flatten(1, 2)
    k, v = (t.repeat_interleave(stride, 1) for t in (k, v))
    out = _aligned_attention(runs, k, v, window, causal, lengths)
    out = out.unflatten(1, (-1, stride)).transpose(2, 3).flatten(2, 3)
    return F.pad(out, (0, 0, first, num_queries - first - num_keys * stride))


def _aligned_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, causal: bool, lengths: Tensor | None
) -> Tensor:
    """Query ``i`` stands at key ``i``."""
    length = q.shape[2]
    back = length if window is None else (window - 1 if causal else window // 2)
    if back < length - 1 and length > 1:
        return _block_local_attention(q, k, v, back, 0 if causal else back, lengths)
    mask = None
    if lengths is not None:
        mask = torch.arange(length, device=q.device) < lengths.clamp(min=1)[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _block_local_attention(
    q: Tensor, k: Tensor, v: Tensor, back: int, ahead: int, lengths: Tensor | None
) -> Tensor:
    """Queries see the keys from ``i - back`` to ``i + ahead``: block by block of queries.

    A causal query executes ``BLOCK + back`` keys, 1.25 times a window of 128.
    """
    length = q.shape[2]
    # Queries whose window starts before the sequence are few: they go densely, and all other
    # blocks share one mask.
    head = 0 if ahead else min(-(-back // BLOCK) * BLOCK, length)
    outputs = []
    if head:
        mask = _band(head, head, 0, back, 0, q)
        first = (t[:, :, :head] for t in (q, k, v))
        out = F.scaled_dot_product_attention(*first, attn_mask=mask)
        if head == length:
            return out
        outputs.append(out.unflatten(2, (-1, BLOCK)))
    outputs.append(_blocks(q, k, v, head, back, ahead, lengths))
    # Tokens before heads in memory, which is how projections and fusion read them.
    blocks = torch.cat([out.permute(0, 2, 3, 1, 4) for out in outputs], 1)
    return blocks.flatten(1, 2)[:, :length].transpose(1, 2)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: int,
    back: int,
    ahead: int,
    lengths: Tensor | None,
) -> Tensor:
    """The blocks of queries from ``head`` on, each with its strip: ``[B, H, blocks, BLOCK, K]``."""
    batch, heads, length, _ = q.shape
    num_blocks = -(-(length - head) // BLOCK)
    reach = -(-back // 16) * 16  # Whole vectors: matrix products run up to a tenth faster.
    strip = BLOCK + reach + ahead
    before = reach - head
    missing = head + num_blocks * BLOCK - length
    # Rows and heads as one dimension first: strips overlap and must stay views.
    q = _extend(q, -head, missing).flatten(0, 1).unflatten(1, (num_blocks, BLOCK))
    k, v = (
        _extend(t, before, missing + ahead).flatten(0, 1).unfold(1, strip, BLOCK).mT for t in (k, v)
    )
    mask = _band(BLOCK, strip, reach, back, ahead, q)
    if ahead or lengths is not None:
        index = torch.arange(num_blocks, device=q.device)[:, None] * BLOCK - before
        index = index + torch.arange(strip, device=q.device)
        ends = (
            torch.full((1,), length, device=q.device) if lengths is None else lengths.clamp(min=1)
        )
        real = (index >= 0) & (index < ends[:, None, None])
        mask = mask & real[:, None, :, None, :]
        # A padding query may have no real key in its strip; it sees its own position instead.
        own = torch.eye(BLOCK, strip, dtype=torch.bool, device=q.device).roll(reach, 1)
        mask = mask | (own & ~mask.any(-1, keepdim=True))
        mask = mask.expand(batch, heads, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(0, (batch, heads))


def _extend(x: Tensor, before: int, after: int) -> Tensor:
    """Tokens put before and after ``x`` (cut off where negative); a view where none is put."""
    x = x[:, :, max(-before, 0) : x.shape[2] + min(after, 0)]
    before, after = max(before, 0), max(after, 0)
    return F.pad(x, (0, 0, before, after)) if before or after else x


def _band(rows: int, columns: int, offset: int, back: int, ahead: int, like: Tensor) -> Tensor:
    """``[rows, columns]`` bool: does ``j`` lie in ``[i + offset - back, i + offset + ahead]``?"""
    ones = torch.ones(rows, columns, dtype=torch.bool, device=like.device)
    return ones.tril(offset + ahead).triu(offset - back)
