"""How the attention kernels are cut into tiles, and the query-key pairs that they visit so.

A kernel is named ``forward``, ``queries`` or ``keys``: the latter two are the backward passes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maha_attn.ops.triton.sizes import next_power_of_2

NARROW_KEYS = 256
"""Spans up to here have hardly an unmasked tile: one masked loop serves them best."""


class _Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps, stages of the load pipeline.

    ``registers`` caps those of a thread, where more programs at a time are worth it.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _tiles(kernel: str, narrow: bool, width: int, dtype: torch.dtype) -> _Tiles:
    """Tiles for a class of problems: the fastest measured that fit into 99 KiB of shared memory.

    Any powers of two from 16 on give correct results.
    """
    if dtype == torch.float32 and width > 128:
        return _Tiles(16, 16, 4, 2)
    if dtype == torch.float32 or width > 128:
        return _Tiles(32, 32, 4, 2)
    return _TILES[kernel, narrow, width > 64]


_TILES = {  # kernel, narrow, wider than 64
    ("forward", True, False): _Tiles(64, 64, 4, 3, 128),
    ("forward", True, True): _Tiles(64, 32, 4, 3),
    ("forward", False, False): _Tiles(64, 64, 4, 3, 128),
    ("forward", False, True): _Tiles(64, 64, 4, 2),
    ("queries", True, False): _Tiles(64, 32, 4, 3),
    ("queries", True, True): _Tiles(64, 32, 4, 2),
    ("queries", False, False): _Tiles(64, 64, 4, 3, 144),
    ("queries", False, True): _Tiles(64, 64, 4, 2),
    ("keys", True, False): _Tiles(32, 64, 4, 3, 128),
    ("keys", True, True): _Tiles(32, 64, 4, 3),
    ("keys", False, False): _Tiles(32, 64, 4, 3, 128),
    ("keys", False, True): _Tiles(32, 64, 4, 3),
}


class Scale(NamedTuple):
    """What one scale's launches need to know.

    ``back`` and ``ahead``: how many keys before and after its own key a query sees; ``stride``:
    queries to a key.
    """

    back: int
    ahead: int
    stride: int


def constants(kernel: str, q: Tensor, scale: Scale, causal: bool) -> dict[str, Any]:
    """What ``kernel`` is compiled for."""
    cut = _tiles(kernel, _is_narrow(scale), q.shape[-1], q.dtype)
    return {
        "LEAD": int(causal),
        "NARROW": _is_narrow(scale),
        "QUERIES": cut.queries,
        "KEYS": cut.keys,
        "WIDTH": q.shape[-1],
        "PADDED": max(next_power_of_2(q.shape[-1]), 16),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": cut.warps,
        "num_stages": cut.stages,
        "maxnreg": cut.registers,
    }


def executed_pairs(kernel: str, q: Tensor, k: Tensor, scale: Scale, causal: bool) -> int:
    """Query-key pairs of all tiles that a kernel visits (``lengths`` not regarded)."""
    (batch, heads, length, width), num_keys = q.shape, k.shape[2]
    back, ahead, stride = scale
    cut = _tiles(kernel, _is_narrow(scale), width, q.dtype)
    lead = int(causal)
    pairs = 0
    if kernel == "keys":
        for first in range(0, num_keys, cut.keys):
            last = min(first + cut.keys, num_keys) - 1
            low = max((first - ahead + lead) * stride - lead, 0)
            high = min((last + back + 1 + lead) * stride - lead, length)
            pairs += cut.keys * max(-(-(high - low) // cut.queries), 0) * cut.queries
    else:
        for first in range(0, length, cut.queries):
            last = min(first + cut.queries, length) - 1
            low = max((first + lead) // stride - lead - back, 0) // cut.keys * cut.keys
            high = min((last + lead) // stride - lead + ahead + 1, num_keys)
            pairs += cut.queries * max(-(-(high - low) // cut.keys), 0) * cut.keys
    return batch * heads * pairs


def _is_narrow(scale: Scale) -> bool:
    return scale.back + scale.ahead < NARROW_KEYS
