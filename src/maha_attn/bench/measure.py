"""How costs are measured: both sides in one process, in turn, with ceilings of the same run.

A time is the median of rounds; in each round every side runs once, so that what disturbs the
machine disturbs all. A spread is half the distance of the quartiles. Ceilings are a large copy
(bytes read and written) and a large matrix product, measured like everything else.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """FLOPs that a side's definition asks for, forward; a multiply-add is two.

    Masked pairs that a kernel visits, and products that a backward pass computes once more, are not
    counted: a side that avoids them has the larger share of the ceiling.

    Attributes:
        attention: ``QKᵀ`` and ``PV`` of the visible pairs; five products backward for these two.
        projections: Products with weights; two backward for each.
    """

    attention: int
    projections: int = 0

    def flops(self, what: str) -> int:
        """Of ``forward``, or of ``train``: forward and backward."""
        if what == "forward":
            return self.attention + self.projections
        return 7 * self.attention // 2 + 3 * self.projections


@dataclass(frozen=True)
class Side:
    """A competitor: a differentiable computation and the inputs that it is differentiated for.

    ``work``: None where its definition has no closed form.
    """

    run: Callable[[], Tensor]
    inputs: list[Tensor]
    work: Work | None = None

    def forward(self) -> Tensor:
        """Without a graph."""
        with torch.no_grad():
            return self.run()

    def train(self) -> None:
        """Forward and backward."""
        out = self.run()
        key = (out.shape, out.stride(), out.dtype)
        if key not in _gradients:  # Made once, so that making it is not timed.
            _gradients.clear()
            _gradients[key] = torch.randn_like(out)
        torch.autograd.grad(out, self.inputs, _gradients[key])

    def nbytes(self, what: str, out: Tensor) -> int:
        """Inputs and output, once each pass; in ``train`` also the gradients of both.

        Any implementation moves as much, but for the inputs that it does not look at.
        """
        return (1 if what == "forward" else 3) * (sum(t.nbytes for t in self.inputs) + out.nbytes)


MakeSide = Callable[[], Side | str]
"""Makes a side, or says why it cannot run."""

_gradients: dict[tuple[object, ...], Tensor] = {}


@dataclass(frozen=True)
class Timing:
    """Of one side: median and half the quartiles' distance over all rounds, in ms.

    ``issue_ms`` is the median time that the host needs to hand the work to the device, a call of
    several in a row as a model makes them. Where it is the larger one and nothing else keeps the
    device busy, it is what a user waits for.
    """

    median_ms: float
    spread_ms: float
    issue_ms: float
    rounds: int


def alternate(
    sides: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    seconds: float = math.inf,
    in_a_row: int = 4,
) -> dict[str, Timing]:
    """Time the sides in turn, ``rounds`` times each after ``warmup`` untimed rounds.

    A side that has taken ``seconds`` in all takes part in no further round after its first. The
    host's time is that of one of ``in_a_row`` calls, as many as the device's queue has room for.

    On a GPU by events around each call. Before each, the device pauses for twice the time that the
    host needs to issue the call, so that the device never waits for the host within it. The host's
    time is measured after that, of each side by itself: a single call between those of other sides
    finds nothing of its own in the processor's caches.
    """
    clock = _device_clock if device.type == "cuda" else _host_clock
    pauses, spent = {}, dict.fromkeys(sides, 0.0)
    for _ in range(warmup):
        for name, run in sides.items():
            elapsed, issued = clock(run, device, 0.0)
            pauses[name] = 1 + 2 * issued
            spent[name] += elapsed / 1e3
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            if times[name] and spent[name] > seconds:
                continue
            times[name].append(clock(run, device, pauses[name])[0])
            spent[name] += times[name][-1] / 1e3
    return {
        name: _timing(times[name], run, device, in_a_row, pauses[name])
        for name, run in sides.items()
    }


def _host_clock(run: Callable[[], object], _: torch.device, __: float) -> tuple[float, float]:
    """Milliseconds of the work and of issuing it, here the same."""
    start = time.perf_counter()
    run()
    elapsed = 1e3 * (time.perf_counter() - start)
    return elapsed, elapsed


def _device_clock(
    run: Callable[[], object], device: torch.device, pause_ms: float
) -> tuple[float, float]:
    """Milliseconds of the work on the device, and of issuing it on the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(pause_ms * _CYCLES_PER_MS))
    begin.record()
    _, issued = _host_clock(run, device, 0.0)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end), issued


_CYCLES_PER_MS = 2_000_000
"""Of a GPU's clock, about: no GPU of today runs much faster."""
_ISSUED, _SLOW_MS = 5, 250.0
"""How often calls in a row are issued; and of what length one call alone is, and once."""


def _timing(
    times: list[float],
    run: Callable[[], object],
    device: torch.device,
    in_a_row: int,
    pause_ms: float,
) -> Timing:
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    median, spread = statistics.median(times), (quartiles[2] - quartiles[0]) / 2
    if device.type != "cuda":
        return Timing(median, spread, median, len(times))

    in_a_row, repeats = (in_a_row, _ISSUED) if median < _SLOW_MS else (1, 1)

    def calls() -> None:
        for _ in range(in_a_row):
            run()

    issued = [_device_clock(calls, device, in_a_row * pause_ms)[1] for _ in range(repeats)]
    return Timing(median, spread, statistics.median(issued) / in_a_row, len(times))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory allocated while ``run`` runs, beyond what was allocated before.

    On a CPU the process's resident memory, where Linux tells its peak; None elsewhere.
    """
    if device.type != "cuda":
        return _host_peak_bytes(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _host_peak_bytes(run: Callable[[], object]) -> int | None:
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # What was freed and kept would hide what is allocated.
    (process / "clear_refs").write_text("5")  # Begin the peak anew (man 5 proc).

    def kilobytes(name: str) -> int:
        return int((process / "status").read_text().split(f"{name}:")[1].split()[0])

    before = kilobytes("VmRSS")
    run()
    return max(kilobytes("VmHWM") - before, 0) * 1024


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """``copy_gb_s`` (read + written) and ``matmul_tflop_s`` of this device, on random data."""
    size, side = (2**29, 8192) if device.type == "cuda" else (2**24, 1024)
    x = torch.randn(size, device=device, dtype=dtype)
    y = torch.empty_like(x)
    a = torch.randn(side, side, device=device, dtype=dtype)
    timings = alternate({"copy": lambda: y.copy_(x), "matmul": lambda: a @ a}, device=device)
    return {
        "copy_gb_s": 2 * x.nbytes / timings["copy"].median_ms / 1e6,
        "matmul_tflop_s": 2 * side**3 / timings["matmul"].median_ms / 1e9,
    }


def provenance(command: str, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What another person needs to repeat a measurement."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none"}
        versions["cudnn"] = str(torch.backends.cudnn.version())
        name = torch.cuda.get_device_name(device)
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "versions": versions,
        "settings": dict(settings),
    }


def _commit() -> str | None:
    """The commit measured, marked where files differ from it; $MAHA_COMMIT where that is set.

    A tree that was copied to another machine knows its commit only by that variable.
    """
    if named := os.environ.get("MAHA_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def benchmark(
    make_sides: Callable[[argparse.Namespace, int], Mapping[str, MakeSide]],
    *,
    prog: str,
    description: str,
    output: str,
    reference: Collection[str],
    arguments: list[str] | None,
) -> None:
    """The frame of a benchmark: options, ceilings, every length, a table, a result file.

    Args:
        make_sides: From the options and a length, the sides.
        prog: The command's name.
        description: Its help.
        output: Default path of the result file.
        reference: Sides of which the fastest is what speedups are against.
        arguments: Of the command line; None: the process's.
    """
    options = _parse(prog, description, output, arguments)
    device = torch.device(options.device)
    keep_other_devices(options.output, Path(output), device)
    limits = ceilings(device, DTYPES[options.dtype])
    print(f"copy {limits['copy_gb_s']:.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s")
    rows = []
    for length in options.lengths:
        torch.manual_seed(options.seed)
        measured = measure_sides(make_sides(options, length), reference, options, limits)
        rows += [{"length": length, **row} for row in measured]
        print(f"\nN = {length}\n{_table(measured)}", flush=True)
        _gradients.clear()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    command = " ".join([prog, *(sys.argv[1:] if arguments is None else arguments)])
    document = provenance(command, settings, device) | {"ceilings": limits, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, default=asdict)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(f"\nWritten: {options.output}")


def measure_sides(
    sides: Mapping[str, MakeSide],
    reference: Collection[str],
    options: argparse.Namespace,
    limits: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row for each side: times, speedups, shares of the `ceilings`, memory; or why not."""
    device = torch.device(options.device)
    rows: dict[str, dict[str, Any]] = {name: {"side": name} for name in sides}
    running: dict[str, Side] = {}
    outputs: dict[str, Tensor] = {}  # Of no content: sizes alone.
    for name, make in sides.items():
        if any(part in name for part in options.skip):
            rows[name]["skipped"] = "left out by --skip"
            continue
        side = make()
        if isinstance(side, str):
            rows[name]["skipped"] = side
        else:
            start = time.perf_counter()
            try:
                outputs[name] = side.forward().to("meta")
                side.train()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:  # Other people's code: whatever it raises is its result.
                rows[name]["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                running[name] = side
                rows[name]["first_call_s"] = time.perf_counter() - start  # Compilation, mostly.
    for what in ("forward", "train"):
        runs = {name: getattr(side, what) for name, side in running.items()}
        timings = alternate(runs, device=device, rounds=options.rounds)
        full = [timings[name].median_ms for name in reference if name in timings]
        for name, timing in timings.items():
            rows[name][what] = timing
            rows[name][f"{what}_speedup"] = min(full) / timing.median_ms if full else None
            side, ms = running[name], timing.median_ms
            nbytes = side.nbytes(what, outputs[name])
            flops = None if side.work is None else side.work.flops(what)
            rows[name] |= {
                f"{what}_bytes": nbytes,
                f"{what}_of_copy": nbytes / ms / 1e6 / limits["copy_gb_s"],
                f"{what}_flops": flops,
                f"{what}_of_matmul": flops and flops / ms / 1e9 / limits["matmul_tflop_s"],
            }
    for name, side in running.items():
        rows[name]["peak_bytes"] = peak_bytes(side.train, device)
    return list(rows.values())


def _parse(
    prog: str, description: str, output: str, arguments: list[str] | None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    cuda = torch.cuda.is_available()
    lengths = [512, 1024, 2048, 4096, 16384, 65536]
    parser.add_argument("--lengths", type=integers, default=lengths, metavar="N,…")
    parser.add_argument("--tokens", type=int, default=65536, help="in a batch: rows × length")
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--heads", type=int, default=16, help="H")
    parser.add_argument("--scales", type=int, default=4, help="S")
    parser.add_argument("--ratio", type=int, default=2, help="r")
    parser.add_argument("--window", type=int, default=128, help="w")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], metavar="SIDE,…")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"default: {output}")
    options = parser.parse_args(arguments)
    check_layer(parser, options)
    return options


def check_layer(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where there is no such device, or heads do not divide the width."""
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device={options.device}: torch finds no CUDA device here; use cpu")
    if options.heads < 1 or options.width % (2 * options.heads):
        parser.error(
            f"--width must be a multiple of twice --heads; got {options.width} and {options.heads}"
        )


def keep_other_devices(output: Path, default: Path, device: torch.device) -> None:
    """End with a message where a result of another device would be overwritten unasked."""
    if output != default or not output.is_file():
        return
    there = json.loads(output.read_text(encoding="utf-8")).get("device")
    if there != (here := provenance("", {}, device)["device"]):
        sys.exit(f"{output} was measured on {there}, not {here}: name another file with --output")


def integers(text: str) -> list[int]:
    """The numbers of ``512,4096``."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be lengths, as 512,4096; got {text!r}")
    return [int(part) for part in text.split(",")]


def _table(rows: list[dict[str, Any]]) -> str:
    """One line a side, times in ms; below, the sides that did not run, and why.

    ``of peak``: of the matrix product's FLOP/s or of the copy's bytes/s, the larger share.
    ``issue`` is the host's time of fwd+bwd.
    """
    name_width = max(len(row["side"]) for row in rows)
    header = [*("forward", "±", "× full", "of peak"), *("fwd+bwd", "±", "× full", "of peak")]
    header += ["issue", "peak MiB"]
    lines = [" " * name_width + "".join(f"{cell:>10}" for cell in header)]
    for row in (row for row in rows if "skipped" not in row):
        cells = []
        for what in ("forward", "train"):
            speedup = row[f"{what}_speedup"]
            cells += [f"{row[what].median_ms:.3f}", f"{row[what].spread_ms:.3f}"]
            cells.append("–" if speedup is None else f"{speedup:.2f}")
            cells.append(f"{max(row[f'{what}_of_copy'], row[f'{what}_of_matmul'] or 0):.0%}")
        cells.append(f"{row['train'].issue_ms:.3f}")
        cells.append("–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}")
        lines.append(row["side"].ljust(name_width) + "".join(f"{cell:>10}" for cell in cells))
    lines += [f"{row['side']}: {row['skipped'][:100]}" for row in rows if "skipped" in row]
    return "\n".join(lines)
