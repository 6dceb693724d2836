"""``maha bench layer``: the whole layer, from tokens to tokens, forward and backward.

MAHA's layer in the default preset and its variants, its window alone, and full attention in a layer
of the same projections and rotary embedding over SDPA flash, cuDNN and materialised. Times of
training (forward, backward, gradients of the input and of every weight), forward alone, and peak
memory. The default lengths begin below the one from which MAHA wins: no row is left out.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_attn.bench.flops import layer_work
from maha_attn.bench.measure import DTYPES, MakeSide, Side, Work, benchmark
from maha_attn.bench.ops import FULL, too_large
from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.ops.rotary import rotate, sequence_table
from maha_attn.spec import AttentionSpec


class FullAttention(nn.Module):
    """Causal full attention over one SDPA backend: what most models run today."""

    def __init__(self, width: int, num_heads: int, backend: SDPBackend) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qk_proj = nn.Linear(width, 2 * width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to the same."""
        packed = self.qk_proj(x).unflatten(-1, (2, self.num_heads, -1))
        q, k = self.rotated(packed)
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        with sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def rotated(self, packed: Tensor) -> Sequence[Tensor]:
        """Rotate queries and keys as MAHA's layer does: by its kernel, or else paired."""
        options = (packed.shape[1], packed.shape[-1], 10000.0, torch.float32, packed.device)
        table = sequence_table(*options, paired=not packed.is_cuda)
        if packed.is_cuda:
            from maha_attn.ops.triton.rotary import rotate_projection

            return rotate_projection(packed, table)
        return [rotate(t, table).transpose(1, 2) for t in packed.unbind(2)]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    benchmark(
        make_sides,
        prog="maha bench layer",
        description="Time the whole layer, from tokens to tokens.",
        output="results/bench-layer.json",
        reference=FULL,
        arguments=arguments,
    )


def make_sides(options: argparse.Namespace, length: int) -> dict[str, MakeSide]:
    """All layers at one length, over the same tokens."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    batch = max(options.tokens // length, 1)
    x = torch.randn(batch, length, options.width, device=device, dtype=dtype, requires_grad=True)

    def side(layer: nn.Module, work: Work) -> Side:
        layer = layer.to(device, dtype)
        used = [p for p in layer.parameters() if p.requires_grad]
        return Side(partial(layer, x), [x, *used], work)

    def full(backend: SDPBackend) -> Side | str:
        if reason := too_large(backend, options, length):
            return reason
        same = AttentionSpec(**(base | {"num_scales": 1, "preset": "paper"}))
        layer = FullAttention(options.width, options.heads, backend)
        return side(layer, layer_work(same, length, batch))

    def maha(**changes: Any) -> Side:
        spec = AttentionSpec(**(base | changes))
        return side(MultiscaleAttention(spec), layer_work(spec, length, batch))

    base: dict[str, Any] = {
        "hidden_size": options.width,
        "num_heads": options.heads,
        "window": options.window,
        "num_scales": options.scales,
        "ratio": options.ratio,
    }
    variants: dict[str, dict[str, Any]] = {
        "window": {"num_scales": 1, "preset": "window"},
        "MAHA convex": {},
        "MAHA convex, τ = 0": {"temperature": 0.0},
        "MAHA nash": {"fusion": "nash"},
        "MAHA gate": {"fusion": "gate"},
        "MAHA mean": {"fusion": "mean"},
        "MAHA convex, recompute": {"recompute": True},
        "MAHA convex, fine queries": {"queries": "fine"},
        "MAHA convex, ratio 4": {"ratio": 4},
    }
    sides: dict[str, MakeSide] = {name: partial(full, backend) for name, backend in FULL.items()}
    return sides | {name: partial(maha, **changes) for name, changes in variants.items()}


if __name__ == "__main__":
    main()
