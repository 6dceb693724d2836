"""``maha bench cost``: every attention at every length, causal and bidirectional.

FLOPs are counted on the ``meta`` device, where shapes run and numbers don't; times, throughput and
memory are of the whole layer, from tokens to tokens, all sides in turn in one process. A row that
has no number says why: the attention has no such form, its library is missing, it ran out of memory
or of its time. What an attention cannot do stands in its row (`maha_attn.baselines`).
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maha_attn.baselines import ATTENTIONS, build_attention, obstacle
from maha_attn.baselines.registry import layer_spec
from maha_attn.bench.cost_table import cost_table, growth_table
from maha_attn.bench.flops import count, visible_pairs
from maha_attn.bench.limits import limited_memory, limited_time
from maha_attn.bench.measure import DTYPES, Side, alternate, ceilings, peak_bytes, provenance
from maha_attn.bench.progress import Steps, progress
from maha_attn.spec import AttentionSpec

HELP = """\
Measure what each attention costs: FLOPs, time, throughput, memory, from 512 to 65536 tokens.

examples:
  maha bench cost --what flops                   counted, not run: seconds, on any machine
  maha bench cost --device cpu --width 256 --heads 4 --lengths 512,1024,2048,4096
  maha bench cost --attentions maha,full,sdpa,materialised --directions causal
"""
LENGTHS = [2**n for n in range(9, 17)]
LONG = 8192
"""Growth is fitted from here on: below, what does not grow with the length hides it."""

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    options = parse(arguments)
    device = torch.device(options.device)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    command = " ".join(["maha bench cost", *(sys.argv[3:] if arguments is None else arguments)])
    document: dict[str, Any] = provenance(command, settings, device)
    timed = options.what != "flops"
    rows: list[Row] = []
    steps = len(options.attentions) * (2 if timed else 1) + (2 if timed else 0)
    steps *= len(options.directions) * len(options.lengths)
    with limited_memory(options.memory, device), progress(steps) as step:
        if timed:
            document["ceilings"] = ceilings(device, DTYPES[options.dtype])
        for direction in options.directions:
            bench = Bench(options, direction == "causal", step)
            for length in options.lengths:
                measured = bench.measure(length)
                rows += measured
                print(f"\n{direction}, N = {length}\n{cost_table(measured)}", flush=True)
    document["rows"] = rows
    if timed:
        document["growth"] = growth(rows)
        print(f"\nSlope of log time against log N from {LONG} tokens on")
        print(growth_table(document["growth"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, default=asdict)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(f"\nWritten: {options.output}")


@dataclass
class Bench:
    """All attentions in one direction.

    Attributes:
        options: Of the command line.
        causal: The direction.
        step: Tells the user what is being done.
        stopped: Why an attention is not tried at longer lengths.
    """

    options: argparse.Namespace
    causal: bool
    step: Steps
    stopped: dict[str, str] = field(default_factory=dict)

    def measure(self, length: int) -> list[Row]:
        """A row for each attention at one length."""
        rows = {name: self._count(name, length) for name in self.options.attentions}
        if self.options.what != "flops":
            running = {}
            for name, row in rows.items():
                self.step(f"N = {length}: {name}")
                side = self._try(name, length) if "skipped" not in row else row["skipped"]
                if isinstance(side, str):
                    row["skipped"] = side
                else:
                    running[name] = side
            self._time(running, rows, length)
        _compare(rows)
        return list(rows.values())

    def _count(self, name: str, length: int) -> Row:
        """What is known of a side without running it."""
        attention = ATTENTIONS[name]
        spec = self._spec()
        row: Row = {
            "attention": name,
            "causal": self.causal,
            "length": length,
            "source": attention.source,
            "limits": attention.properties(),
            "note": attention.note,
        }
        if reason := obstacle(name, causal=self.causal):
            return row | {"skipped": reason}
        same = _SAME_PAIRS.get(name, name)
        if ATTENTIONS[same].cache:
            row["visible_pairs"] = visible_pairs(layer_spec(same, spec), length)
        if attention.needs_gpu:
            row["not_counted"] = "its kernels cannot be counted"
        elif self.options.what != "time":
            self.step(f"N = {length}: {name}, FLOPs")
            try:
                row |= asdict(count(name, spec, length))
            except Exception as error:  # Other people's code: whatever it raises is its result.
                row["not_counted"] = _first_line(error)
        return row

    def _try(self, name: str, length: int) -> Side | str:
        """A side that has run once, forward and backward; or why it cannot."""
        options, attention = self.options, ATTENTIONS[name]
        if name in self.stopped:
            return self.stopped[name]
        if attention.needs_gpu and options.device == "cpu":
            return "needs a CUDA device"
        if options.dtype == "bf16" and not attention.bf16:
            return "has no bf16"
        try:
            side = self._side(name, length)
            if torch.device(options.device).type == "cuda":
                side.train()  # Kernels are compiled here, which is no part of a pass.
                _wait(options.device)
            start = time.perf_counter()
            with limited_time(options.limit):
                side.forward()
                _wait(options.device)
                # The backward pass is one call, which nothing interrupts: about twice as long.
                if 3 * (time.perf_counter() - start) > options.limit:
                    raise TimeoutError
                side.train()
                _wait(options.device)
        except TimeoutError:
            self.stopped[name] = f"stopped at N = {length}: one pass takes over {options.limit} s"
            return self.stopped[name]
        except Exception as error:  # Other people's code: whatever it raises is its result.
            if "allocate" in str(error) or "out of memory" in str(error):
                self.stopped[name] = f"out of memory at N = {length}"
                return self.stopped[name]
            return _first_line(error)
        return side

    def _side(self, name: str, length: int) -> Side:
        options = self.options
        torch.manual_seed(options.seed)
        layer: nn.Module = build_attention(name, self._spec(), max_length=length)
        layer = layer.to(options.device, DTYPES[options.dtype])
        x = torch.randn(self._batch(length), length, options.width).to(next(layer.parameters()))
        x.requires_grad_()
        return Side(partial(layer, x), [x, *(p for p in layer.parameters() if p.requires_grad)])

    def _time(self, running: dict[str, Side], rows: dict[str, Row], length: int) -> None:
        """Time all sides in turn, then the memory of each."""
        options, device = self.options, torch.device(self.options.device)
        batch = self._batch(length)
        for what in ("forward", "train"):
            self.step(f"N = {length}: all in turn, {what}")
            timings = alternate(
                {name: getattr(side, what) for name, side in running.items()},
                device=device,
                rounds=options.rounds,
                warmup=1,
                seconds=options.limit,
            )
            for name, timing in timings.items():
                rows[name]["batch"] = batch
                rows[name][what] = asdict(timing)
                rows[name][f"{what}_sequences_per_s"] = 1e3 * batch / timing.median_ms
        for name, side in running.items():
            rows[name]["forward_peak_bytes"] = peak_bytes(side.forward, device)
            rows[name]["train_peak_bytes"] = peak_bytes(side.train, device)

    def _spec(self) -> AttentionSpec:
        options = self.options
        return AttentionSpec(
            hidden_size=options.width,
            num_heads=options.heads,
            num_scales=options.scales,
            ratio=options.ratio,
            window=options.window,
            causal=self.causal,
        )

    def _batch(self, length: int) -> int:
        return max(self.options.tokens // length, 1)


_SAME_PAIRS = {"sdpa": "full", "materialised": "full", "longformer": "sliding"}
_REFERENCE = {
    "attention_flops": "full",
    "visible_pairs": "full",
    "train_peak_bytes": "materialised",
}


def _compare(rows: dict[str, Row]) -> None:
    """What share is saved: of full attention's FLOPs and pairs, of materialised memory."""
    for key, reference in _REFERENCE.items():
        whole = rows.get(reference, {}).get(key)
        for row in rows.values():
            if whole and row.get(key) is not None:
                row[f"{key}_saved"] = 1 - row[key] / whole


def growth(rows: list[Row]) -> list[Row]:
    """Slopes of log time of one sequence against log N, from 8192 tokens on, by least squares.

    1 is linear, 2 quadratic. None where fewer than two lengths were measured.
    """
    slopes = []
    for causal, name in sorted({(row["causal"], row["attention"]) for row in rows}):
        own = [r for r in rows if (r["causal"], r["attention"]) == (causal, name)]
        own = [r for r in own if r["length"] >= LONG and "train" in r]
        slope: Row = {"attention": name, "causal": causal, "lengths": [r["length"] for r in own]}
        for what in ("forward", "train"):
            slope[what] = None
            if len(own) > 1:
                times = [math.log(r[what]["median_ms"] / r["batch"]) for r in own]
                lengths = [math.log(r["length"]) for r in own]
                slope[what] = statistics.linear_regression(lengths, times).slope
        slopes.append(slope)
    return slopes


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="maha bench cost",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()

    def choices(known: list[str], text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}; got {', '.join(unknown)}"
            )
        return chosen

    names, directions = list(ATTENTIONS), ["causal", "bidirectional"]
    add = parser.add_argument
    add("--what", choices=("all", "flops", "time"), default="all", help="default: all")
    add("--lengths", type=_lengths, default=LENGTHS, metavar="N,…", help="default: 512 … 65536")
    some = partial(choices, names)
    all_names = f"default: all of {', '.join(names)}"
    add("--attentions", type=some, default=names, metavar="NAME,…", help=all_names)
    some = partial(choices, directions)
    add("--directions", type=some, default=directions, metavar="NAME,…", help="default: both")
    rows = "in a batch: rows × length, at least a row (default: 65536 on a GPU, 1 on a CPU)"
    add("--tokens", type=int, default=65536 if cuda else 1, metavar="N", help=rows)
    add("--width", type=int, default=1024, metavar="D", help="default: 1024")
    add("--heads", type=int, default=16, metavar="H", help="default: 16")
    add("--scales", type=int, default=4, metavar="S", help="default: 4")
    add("--ratio", type=int, default=2, metavar="R", help="default: 2")
    add("--window", type=int, default=128, metavar="W", help="default: 128")
    add("--dtype", choices=list(DTYPES), default="bf16" if cuda else "fp32")
    add("--device", default="cuda" if cuda else "cpu")
    add("--rounds", type=int, default=10 if cuda else 5, help="each side's turns, at most")
    limit = "a side that needs longer, for one pass or all its turns, is stopped (default: 60)"
    add("--limit", type=float, default=60, metavar="SECONDS", help=limit)
    memory = "that the sides may allocate on a CPU (default: 80 %% of what is available)"
    add("--memory", type=float, metavar="GIB", help=memory)
    add("--seed", type=int, default=0)
    output = Path("results/bench-cost.json")
    add("--output", type=Path, default=output, help=f"default: {output}")
    return parser.parse_args(arguments)


def _lengths(text: str) -> list[int]:
    lengths = sorted(int(part) for part in text.split(","))
    if lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"lengths must be at least 1, got {lengths[0]}")
    return lengths


if __name__ == "__main__":
    main()
