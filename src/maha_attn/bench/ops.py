"""``maha bench ops``: the attention itself, from Q, K and V to the heads' outputs.

Every side gets tensors as a projection leaves them and is differentiated for all its inputs. MAHA's
sides: attention of all scales; the same with each fusion; both of a steeper pyramid, ratio 4; and
its window alone. Full attention: SDPA flash, SDPA cuDNN, SDPA materialised. Windows and sparse:
FlexAttention, and flash-attn and native sparse attention (flash-linear-attention) where they are
installed. A side that cannot run says why in its row. Ratios are against the fastest full attention
of the same run. The default lengths begin below the one from which MAHA wins: no row is left out.
"""

import argparse
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_attn.bench.flops import visible_pairs
from maha_attn.bench.measure import DTYPES, MakeSide, Side, Work, benchmark
from maha_attn.layers.fusion import fusion_options
from maha_attn.ops.fusion import fuse
from maha_attn.ops.pyramid import coarse_length
from maha_attn.ops.scale_attention import scale_attention
from maha_attn.spec import AttentionSpec

FULL = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA materialised": SDPBackend.MATH,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    benchmark(
        make_sides,
        prog="maha bench ops",
        description="Time the attention itself, from Q, K and V to the heads' outputs.",
        output="results/bench-ops.json",
        reference=FULL,
        arguments=arguments,
    )


def make_sides(options: argparse.Namespace, length: int) -> dict[str, MakeSide]:
    """All sides at one length."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    batch, heads = max(options.tokens // length, 1), options.heads
    width = options.width // heads

    def projected(n: int) -> list[Tensor]:
        packed = torch.randn(batch, n, 2, heads, width, device=device, dtype=dtype)
        values = torch.randn(batch, n, heads, width, device=device, dtype=dtype)
        return [t.transpose(1, 2).detach().requires_grad_() for t in (*packed.unbind(2), values)]

    spec = AttentionSpec(
        hidden_size=options.width, num_heads=heads, num_scales=options.scales, ratio=options.ratio,
        window=options.window,
    )  # fmt: skip
    fine = projected(length)

    def work(spec: AttentionSpec) -> Work:
        return Work(4 * options.width * batch * visible_pairs(spec, length))

    windowed, full_span = (work(replace(spec, num_scales=1, preset=p)) for p in ("window", "paper"))

    def full(backend: SDPBackend) -> Side | str:
        run = partial(_sdpa, fine, backend)
        return too_large(backend, options, length) or Side(run, fine, full_span)

    def maha(spec: AttentionSpec) -> dict[str, MakeSide]:
        """Attention alone, and each fusion behind it."""
        lengths = [length]
        for _ in range(spec.num_scales - 1):
            lengths.append(coarse_length(lengths[-1], spec.ratio, causal=True))
        scales = [fine, *(projected(n) for n in lengths[1:] if n > 0)]
        logits = torch.randn(batch, length, heads, len(scales), device=device, dtype=dtype)
        logits = logits.transpose(1, 2).detach().requires_grad_()
        inputs = [t for scale in scales for t in scale]

        def attend() -> list[Tensor]:
            spans = spec.spans[: len(scales)]
            return [scale_attention(*s, window=w) for s, w in zip(scales, spans, strict=True)]

        def fused(tensors: dict[str, Any], **changes: Any) -> MakeSide:
            options = fusion_options(replace(spec, **changes))
            used = [*inputs, logits] if "logits" in tensors else inputs
            return lambda: Side(lambda: fuse(attend(), options, **tensors).output, used, work(spec))

        gate = {"logits": logits}
        convex = gate | {"target": fine[2]}
        return {
            "attention, all scales": lambda: Side(lambda: _joined(attend()), inputs, work(spec)),
            "convex": fused(convex, fusion="convex"),
            "convex, τ = 0": fused(convex, fusion="convex", temperature=0.0),
            "nash": fused({}, fusion="nash"),
            "gate": fused(gate, fusion="gate"),
            "mean": fused({}, fusion="mean"),
        }

    window = partial(scale_attention, *fine, window=options.window)
    sides: dict[str, MakeSide] = {name: partial(full, backend) for name, backend in FULL.items()}
    sides["FlexAttention window"] = partial(_flex_window, fine, options.window, windowed)
    sides["flash-attn window"] = partial(_flash_attn_window, fine, options.window, windowed)
    sides["native sparse attention (fla)"] = partial(_native_sparse, fine)
    sides["window"] = lambda: Side(window, fine, windowed)
    sides |= {f"MAHA {name}": side for name, side in maha(spec).items()}
    steeper = maha(replace(spec, ratio=4))
    for name in ("attention, all scales", "convex"):
        sides[f"MAHA {name}, ratio 4"] = steeper[name]
    return sides


class _Join(torch.autograd.Function):
    """The first output, with a gradient for all of them, at no cost."""

    @staticmethod
    def forward(ctx, *outputs: Tensor) -> Tensor:
        ctx.outputs = [(o.shape, o.stride()) for o in outputs]
        return outputs[0].view_as(outputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Coarse gradients: memory of the finest one's, in the coarse shape.
        return tuple(grad.as_strided(shape, stride) for shape, stride in ctx.outputs)


def _joined(outputs: list[Tensor]) -> Tensor:
    joined = _Join.apply(*outputs)
    assert isinstance(joined, Tensor)
    return joined


def _sdpa(inputs: list[Tensor], backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = inputs
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flex_window(inputs: list[Tensor], window: int, work: Work) -> Side | str:
    if not inputs[0].is_cuda:
        return "no backward pass on this device"
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def visible(batch, head, i, j):
        return (i >= j) & (i - j < window)

    # Its own builder makes an N × N matrix; the blocks of a window are known without one.
    block, length = 128, inputs[0].shape[2]
    rows = torch.arange(-(-length // block), device=inputs[0].device, dtype=torch.int32)
    first = ((rows * block - window + 1) // block).clamp(min=0)
    columns = (first[:, None] + rows).clamp(max=len(rows) - 1)
    mask = BlockMask.from_kv_blocks(
        (rows - first + 1)[None, None],
        columns[None, None],
        BLOCK_SIZE=block,
        mask_mod=visible,
        seq_lengths=(length, length),
    )
    # Fresh code each time: after eight recompilations it would fall back to a dense path.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = inputs

    def run() -> Tensor:
        return compiled(q, k, v, block_mask=mask)  # pyright: ignore

    return Side(run, inputs, work)


def _flash_attn_window(inputs: list[Tensor], window: int, work: Work) -> Side | str:
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    def run() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in inputs)
        return flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))

    return Side(run, inputs, work)


def _native_sparse(inputs: list[Tensor]) -> Side | str:
    """A key head for 16 heads of queries, as it requires: fewer keys to read than the others."""
    if importlib.util.find_spec("fla") is None:
        return "not installed"
    from maha_attn.baselines.native_sparse import GROUP, native_sparse

    q, k, v = (t.transpose(1, 2) for t in inputs)
    if q.shape[2] % GROUP:
        return f"needs a multiple of {GROUP} heads"
    shared = (t[:, :, ::GROUP] for t in (k, v))
    q, k, v = (t.detach().contiguous().requires_grad_() for t in (q, *shared))
    gates = torch.rand(*q.shape[:3], 3, device=q.device, dtype=q.dtype)
    return Side(partial(native_sparse, q, k, v, gates), [q, k, v])


def too_large(backend: SDPBackend, options: argparse.Namespace, length: int) -> str | None:
    """Why materialised attention cannot run: it holds about four ``N × N`` matrices in fp32."""
    device = torch.device(options.device)
    needed = 16 * max(options.tokens, length) * length * options.heads
    free = 2**32
    if device.type == "cuda":
        torch.cuda.empty_cache()  # What other lengths have left would count as taken.
        free, _ = torch.cuda.mem_get_info(device)
    if backend != SDPBackend.MATH or needed < free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB"


if __name__ == "__main__":
    main()
