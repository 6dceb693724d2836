"""``maha bench decode``: one more token for every row, by the cache of a long past.

A stack of attention layers with residual connections, nothing else: MAHA with coarse and with fine
queries against full attention, whose layers have the same projections and rotary embedding. Full
attention sees a preallocated cache of which every slot is real, its best case. On a GPU every side
also runs as a CUDA graph. Caches are filled with noise: what they hold costs nothing.

A MAHA step does more work the more scales it completes a block of, so times are of whole cycles of
``r^(S-1)`` steps, and rows stand at different phases of it. Bytes of a step are the weights and the
keys and values that its due queries see, each read once, on average over a cycle.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_attn.bench.measure import (
    DTYPES,
    alternate,
    ceilings,
    check_layer,
    integers,
    keep_other_devices,
    provenance,
)
from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.layers.cache import AttentionCache
from maha_attn.layers.graph import GraphedStep
from maha_attn.ops.rotary import rotary_table, rotate
from maha_attn.spec import AttentionSpec

FULL = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MAHA = {"MAHA": "coarse", "MAHA, fine queries": "fine"}
WARMUP = 2

Stack = tuple[Callable[[Tensor], Tensor], Sequence[AttentionCache], int, float]
"""A step of all layers, what it continues, the bytes of its caches, and those that it reads."""


class CachedFullAttention(nn.Module):
    """Full attention of one new token to a preallocated cache that it completes."""

    def __init__(self, width: int, num_heads: int, batch: int, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        shape = (batch, num_heads, length, width // num_heads)
        self.keys, self.values = (nn.Buffer(torch.empty(shape)) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """``[B, 1, D]`` to the same; ``table`` is the last position's."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        self.keys[:, :, -1:] = rotate(k, table).transpose(1, 2)
        self.values[:, :, -1:] = v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            rotate(q, table).transpose(1, 2), self.keys, self.values
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    options = _parse(arguments)
    device = torch.device(options.device)
    limits = ceilings(device, DTYPES[options.dtype])
    print(f"copy {limits['copy_gb_s']:.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s")
    rows = []
    for context in options.contexts:
        torch.manual_seed(options.seed)
        with torch.no_grad():
            measured = _measure(options, context, limits["copy_gb_s"])
        rows += [{"context": context, **row} for row in measured]
        print(f"\n{context} tokens of {options.rows} rows\n{_table(measured)}", flush=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    command = " ".join(["maha bench decode", *(sys.argv[1:] if arguments is None else arguments)])
    document = provenance(command, settings, device) | {"ceilings": limits, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, default=asdict)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(f"\nWritten: {options.output}")


def _measure(options: argparse.Namespace, context: int, copy_gb_s: float) -> list[dict[str, Any]]:
    """A row for each side: milliseconds a step, bytes of its caches; or why it did not run."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    x = torch.randn(options.rows, 1, options.width, device=device, dtype=dtype)
    cycle = options.ratio ** (options.scales - 1)
    full = _full_stack(options, context, x)
    stacks: dict[str, Stack] = {name: (partial(full[0], b), *full[1:]) for name, b in FULL.items()}
    for name, queries in MAHA.items():
        stacks[name] = _maha_stack(options, context, x, cycle, queries)
    rows: dict[str, dict[str, Any]] = {}
    runs = {}
    for name, (step, caches, nbytes, read) in stacks.items():
        sizes = {"cache_bytes": nbytes, "step_bytes": read}
        eager = rows[name] = {"side": name, **sizes}
        start = time.perf_counter()
        try:
            step(x)
        except RuntimeError as error:
            eager["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        eager["first_call_s"] = time.perf_counter() - start  # Compilation, mostly.
        runs[name] = partial(_repeat, step, x, cycle)
        if device.type == "cuda":
            graphed = rows[f"{name}, graph"] = {"side": f"{name}, graph", **sizes}
            try:
                runs[graphed["side"]] = partial(_repeat, GraphedStep(step, [x], caches), x, cycle)
            except RuntimeError as error:
                graphed["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
    timings = alternate(  # A call is a whole cycle of steps already.
        runs, device=device, rounds=options.rounds, warmup=WARMUP, in_a_row=1
    )
    fastest = min(
        timing.median_ms for name, timing in timings.items() if name.split(",")[0] in FULL
    )
    for name, timing in timings.items():
        rows[name] |= {
            "step_ms": timing.median_ms / cycle,
            "spread_ms": timing.spread_ms / cycle,
            "issue_ms": timing.issue_ms / cycle,
            "rounds": timing.rounds,
            "speedup": fastest / timing.median_ms,
            "of_copy": rows[name]["step_bytes"] * cycle / timing.median_ms / 1e6 / copy_gb_s,
            "cache_share": rows[name]["cache_bytes"] / full[2],
        }
    return list(rows.values())


def _repeat(step: Callable[[Tensor], Tensor], x: Tensor, times: int) -> None:
    for _ in range(times):
        step(x)


def _full_stack(
    options: argparse.Namespace, context: int, x: Tensor
) -> tuple[Callable[[SDPBackend, Tensor], Tensor], list[AttentionCache], int, float]:
    """Layers of full attention; the backend is chosen at each step."""
    with x.device:
        layers = [
            CachedFullAttention(options.width, options.heads, options.rows, context).to(x.dtype)
            for _ in range(options.layers)
        ]
        position = torch.tensor([context - 1])
    table = rotary_table(position, options.width // options.heads)
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()

    def step(backend: SDPBackend, x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            for layer in layers:
                x = x + layer(x, table)
        return x

    nbytes = sum(b.nbytes for layer in layers for b in layer.buffers())
    weights = sum(p.nbytes for layer in layers for p in layer.parameters())
    return step, [], nbytes, nbytes + weights


def _maha_stack(
    options: argparse.Namespace, context: int, x: Tensor, cycle: int, queries: Any
) -> Stack:
    """Layers of MAHA, with room for all steps that are measured, rows one token apart."""
    spec = AttentionSpec(
        hidden_size=options.width,
        num_heads=options.heads,
        num_scales=options.scales,
        ratio=options.ratio,
        window=options.window,
        fusion=options.fusion,
        queries=queries,
    )
    # Eager and graphed rounds, and the steps that try them out.
    steps = cycle * (2 * (options.rounds + WARMUP) + 2)
    layers, caches = [], []
    for _ in range(options.layers):
        layers.append(MultiscaleAttention(spec).to(x.device, x.dtype))
        cache = AttentionCache(spec, context + steps)
        state = cache.reserve(x, 0)
        for tensor in (state.taps, state.keys, state.values, state.outputs):
            tensor.normal_()
        rows = torch.arange(options.rows, device=x.device)
        state.lengths.copy_(context + rows % cycle)
        cache.seen = context + cycle
        caches.append(cache)

    def step(x: Tensor) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            x = x + layer(x, cache=cache)
        return x

    read = sum(bytes_read(layer, options.rows, context) for layer in layers)
    return step, caches, sum(cache.nbytes for cache in caches), read


def bytes_read(layer: MultiscaleAttention, rows: int, context: int) -> float:
    """Of a step, on average over a cycle in which the rows stand at different phases.

    The queries of scale ``s`` are due every ``r^s`` steps of a row, or at each step if fine.
    """
    spec, fine = layer.spec, layer.spec.queries == "fine"
    total = float(sum(p.nbytes for p in layer.parameters()))
    weight = layer.v_proj.weight  # As large as a scale's projection to queries, or to keys.
    for stride, span in zip(spec.strides, spec.spans, strict=True):
        idle = max(1 - rows / stride, 0)  # Share of the steps at which no row completes a block.
        total -= idle * (1 if fine else 2) * weight.nbytes
        keys = min(span or context, context // stride)
        seen = 2 * rows * keys * spec.hidden_size * weight.element_size()
        total += seen / (1 if fine else stride)
    return total


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="maha bench decode",
        description="Time a step of cached decoding: one more token for every row, all layers.",
    )
    cuda = torch.cuda.is_available()
    contexts = [4096, 16384, 65536]
    parser.add_argument(
        "--contexts", type=integers, default=contexts, metavar="N,…", help="tokens in the cache"
    )
    parser.add_argument("--rows", type=int, default=8, help="B")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--heads", type=int, default=16, help="H")
    parser.add_argument("--scales", type=int, default=4, help="S")
    parser.add_argument("--ratio", type=int, default=2, help="r")
    parser.add_argument("--window", type=int, default=128, help="w")
    parser.add_argument("--fusion", default="convex")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="cycles of r^(S-1) steps")
    parser.add_argument("--seed", type=int, default=0)
    output = "results/bench-decode.json"
    parser.add_argument("--output", type=Path, default=Path(output), help=f"default: {output}")
    options = parser.parse_args(arguments)
    check_layer(parser, options)
    keep_other_devices(options.output, Path(output), torch.device(options.device))
    return options


def _table(rows: list[dict[str, Any]]) -> str:
    """One line a side; below, the sides that did not run, and why."""
    name_width = max(len(row["side"]) for row in rows)
    header = ["ms a step", "±", "× full", "of copy", "issue", "cache MiB", "of full"]
    lines = [" " * name_width + "".join(f"{cell:>11}" for cell in header)]
    for row in (row for row in rows if "skipped" not in row):
        cells = [f"{row[key]:.3f}" for key in ("step_ms", "spread_ms", "speedup")]
        cells += [f"{row['of_copy']:.0%}", f"{row['issue_ms']:.3f}"]
        cells += [f"{row['cache_bytes'] / 2**20:.0f}", f"{row['cache_share']:.2%}"]
        lines.append(row["side"].ljust(name_width) + "".join(f"{cell:>11}" for cell in cells))
    lines += [f"{row['side']}: {row['skipped'][:100]}" for row in rows if "skipped" in row]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
