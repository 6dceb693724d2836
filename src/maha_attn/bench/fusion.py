"""`python -m maha_attn.bench.fusion`: the bandwidth of fusion alone, against a copy's.

Fusion is bound by memory as long as its solvers hide behind it. Bytes are counted once each: every
scale's output at its own resolution, target, prior, weights and result; backward, their gradients
too. A convex fusion with a target of its own moves more bytes than the mean: compare the shares of
the copy's bandwidth, or ``finest`` and ``nash``, which move the same.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maha_attn.bench.measure import DTYPES, alternate, ceilings, provenance
from maha_attn.layers.fusion import fusion_options
from maha_attn.spec import AttentionSpec

PROBLEMS: dict[str, dict[str, Any]] = {
    "mean": {"fusion": "mean"},
    "gate": {"fusion": "gate"},
    "convex, value": {"fusion": "convex"},
    "convex, finest": {"fusion": "convex"},
    "convex, τ = 0": {"fusion": "convex", "temperature": 0.0},
    "nash": {"fusion": "nash"},
}


class Problem:
    """The tensors of one fusion.

    Args:
        options: Of the command line.
        name: A key of `PROBLEMS`.
    """

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        spec = AttentionSpec(
            hidden_size=options.width, num_heads=options.heads, num_scales=options.scales,
            ratio=options.ratio, **PROBLEMS[name],
        )  # fmt: skip
        channels, method = spec.head_dim, spec.fusion
        draw = partial(self._draw, options)
        dtype = DTYPES[options.dtype]
        self.outputs = [draw(options.length // stride, channels, dtype) for stride in spec.strides]
        self.tensors: dict[str, Tensor] = {}
        if method in ("gate", "convex"):
            self.tensors["logits"] = draw(options.length, options.scales, torch.float32)
        if method == "convex":
            self.tensors["gram_scale"] = torch.ones(options.heads, device=options.device)
            if name != "convex, finest":
                self.tensors["target"] = draw(options.length, channels, dtype)
        self.inputs = [*self.outputs, *self.tensors.values()]
        for t in self.inputs:
            t.requires_grad_()
        if name == "convex, finest":
            self.tensors["target"] = self.outputs[0]
        self.options = fusion_options(spec)
        self.gradient = torch.randn_like(self.outputs[0])
        self.solved = method in ("convex", "nash")

    @staticmethod
    def _draw(
        options: argparse.Namespace, length: int, channels: int, dtype: torch.dtype
    ) -> Tensor:
        rows = options.tokens // options.length
        size = (rows, length, options.heads, channels)
        return torch.randn(size, device=options.device).mul_(0.5).to(dtype).transpose(1, 2)

    def forward(self) -> Tensor:
        """With a graph."""
        from maha_attn.ops.triton.fusion import fuse

        return fuse(self.outputs, self.options, **self.tensors, certified=False).output

    def forward_alone(self) -> Tensor:
        """Without one."""
        with torch.no_grad():
            return self.forward()

    def backward(self) -> Callable[[], object]:
        """The backward pass of one forward pass made now."""
        output = self.forward()
        return partial(torch.autograd.grad, output, self.inputs, self.gradient, retain_graph=True)

    def bytes_moved(self) -> dict[str, int]:
        """Of either pass."""
        scales, result = sum(u.nbytes for u in self.outputs), self.outputs[0].nbytes
        weights = 4 * result // self.outputs[0].element_size() // self.outputs[0].shape[-1]
        weights *= len(self.outputs)
        others = sum(t.nbytes for t in self.inputs) - scales
        forward = scales + others + weights + result
        targets = self.tensors.get("target")
        read = targets.nbytes if targets is not None and targets is not self.outputs[0] else 0
        needs_outputs = "logits" in self.tensors or self.solved
        backward = scales * (1 + needs_outputs) + result + weights + read + others
        return {"forward": forward, "backward": backward}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write a result file."""
    parser = argparse.ArgumentParser(prog="python -m maha_attn.bench.fusion", description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536, help="in a batch: rows × length")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--heads", type=int, default=16, help="H")
    parser.add_argument("--scales", type=int, default=4, help="S")
    parser.add_argument("--ratio", type=int, default=2, help="r")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/bench-fusion.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    limits = ceilings(device, DTYPES[options.dtype])
    problems = {name: Problem(options, name) for name in PROBLEMS}
    rows = []
    print(
        f"copy {limits['copy_gb_s']:.0f} GB/s\n{'':16}{'pass':>10}{'ms':>9}{'±':>9}{'of copy':>9}"
    )
    for which in ("forward", "backward"):
        runs = {
            n: p.forward_alone if which == "forward" else p.backward() for n, p in problems.items()
        }
        for name, timing in alternate(runs, device=device, rounds=options.rounds).items():
            moved = problems[name].bytes_moved()[which]
            share = moved / timing.median_ms / 1e6 / limits["copy_gb_s"]
            rows.append(
                {"fusion": name, "pass": which, "bytes": moved, "of_copy": share, "time": timing}
            )
            cells = f"{timing.median_ms:9.3f}{timing.spread_ms:9.3f}{share:9.0%}"
            print(f"{name:16}{which:>10}{cells}")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    document = provenance(parser.prog, settings, device) | {"ceilings": limits, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, default=asdict)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
