"""``maha bench first_call``: what the first calls take in a process that finds nothing compiled."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from maha_attn.bench.measure import DTYPES, check_layer, keep_other_devices, provenance
from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.layers.cache import AttentionCache
from maha_attn.spec import AttentionSpec


def main(arguments: list[str] | None = None) -> None:
    """Measure in a process of its own, print, write JSON."""
    parser = argparse.ArgumentParser(
        prog="maha bench first_call",
        description="Time the first training step and the first decoded token of a layer, with an "
        "empty cache of compiled kernels. A busy host takes longer: let nothing run beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--heads", type=int, default=16, help="H")
    parser.add_argument("--length", type=int, default=4096, help="N")
    parser.add_argument("--fusion", default="convex")
    parser.add_argument("--output", type=Path, default=Path("results/bench-first-call.json"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_layer(parser, options)
    if options.inner:
        print(json.dumps(_measure(options)))
        return
    keep_other_devices(options.output, parser.get_default("output"), torch.device(options.device))
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as cache:
        inner = subprocess.run(
            [sys.executable, "-m", "maha_attn.bench.first_call", *given, "--inner"],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(inner.stdout)
    for name, seconds in found["seconds"].items():
        times = [kernel["seconds"] for kernel in found["compiling"][name]]
        print(f"{name:<10}{seconds:8.1f} s; compiled: {len(times)} kernels, {sum(times):.1f} s")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    command = " ".join(["maha bench first_call", *given])
    document = provenance(command, settings, torch.device(options.device)) | found
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {options.output}")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Of the device's own start, of a training step, and of a prompt and a decoded token.

    Returns:
        ``seconds`` that each took, and ``compiling``: how long each of its kernels was.
    """
    device, times = torch.device(options.device), [time.perf_counter()]
    kernels: list[list[dict[str, Any]]] = [[]]
    if device.type == "cuda":
        from triton import knobs

        def compiled(*, metadata: Mapping[str, Any], times: Any, **_: Any) -> None:
            kernels[-1].append({"kernel": metadata["name"], "seconds": times.total / 1e6})

        knobs.compilation.listener = compiled

    def note() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        kernels.append([])

    spec = AttentionSpec(hidden_size=options.width, num_heads=options.heads, fusion=options.fusion)
    layer = MultiscaleAttention(spec).to(device, DTYPES[options.dtype])
    x = torch.randn(1, options.length, options.width, device=device, dtype=DTYPES[options.dtype])
    note()
    y = layer(x.requires_grad_())
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    note()
    with torch.no_grad():
        cache = AttentionCache(spec)
        layer(x, cache=cache)
        layer(x[:, :1], cache=cache)
    note()
    seconds = [after - before for before, after in pairwise(times)]
    phases = ("start", "training", "decoding")
    return {
        "seconds": dict(zip(phases, seconds, strict=True)),
        "compiling": dict(zip(phases, kernels[:-1], strict=True)),
    }


if __name__ == "__main__":
    main()
