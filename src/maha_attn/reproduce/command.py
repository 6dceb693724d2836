"""``maha reproduce``: its options, its progress, its summary."""

import argparse
import math
import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maha_attn.bench.measure import provenance
from maha_attn.experiments.definition import BUDGETS, Exhibit, exhibits, experiments
from maha_attn.experiments.results import FOLDER
from maha_attn.reproduce.job import Clock, Job
from maha_attn.reproduce.runner import Outcome, Selection, jobs, run_missing

HELP = """\
Run what a table or figure of the paper needs and what is not in the results yet, continue what was
interrupted, then write the report.

NAME is one of the exhibits below, or all. A run is one row with one seed at one budget; each is
kept in a file of its own as soon as it is done, and is not run again unless its recipe changed.
"""
EXAMPLES = """\
examples:
  maha reproduce figure3 --device cpu
  maha reproduce table2 --budget smoke         seconds a row; shows that everything works
  maha reproduce table2 --seeds 1,2 --rows gate,convex --time_limit 500
  maha reproduce table1 --experiments sst2,mnli --rows maha,full
  maha reproduce all                           hours on one GPU; stop and restart it at will
"""


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    exhibits: list[Exhibit]
    selection: Selection
    time_limit_s: float | None
    command: str


def parse(arguments: list[str]) -> Options:
    """Read the command line.

    Raises:
        ValueError: A name, budget, row, seed or device is unknown, or the commit is.
    """
    known = exhibits()
    lines = [f"  {name:<12}{exhibit.title}" for name, exhibit in known.items()]
    parser = argparse.ArgumentParser(
        prog="maha reproduce",
        description=HELP,
        epilog="\n".join(["exhibits:", *lines, "", EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="an exhibit, or all")
    parser.add_argument(
        "--budget",
        default="small",
        choices=BUDGETS,
        help="smoke: seconds a row; small (default): minutes a row on one GPU; paper: its settings",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--seeds", type=_seeds, metavar="N,…", help="instead of the exhibit's")
    parser.add_argument("--rows", type=_names, metavar="ROW,…", help="only these rows")
    parser.add_argument(
        "--experiments", type=_names, metavar="NAME,…", help="only these parts of the exhibit"
    )
    parser.add_argument(
        "--time_limit", type=_seconds, metavar="SECONDS", help="then stop at a checkpoint"
    )
    parser.add_argument(
        "--shared_device",
        action="store_true",
        help="other runs use the device meanwhile: record no speed",
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/paper"),
        help="where unfinished runs and trained models are; default: runs/paper",
    )
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}; `maha reproduce --help` lists them")
    if parsed.name != "all" and parsed.name not in known:
        raise ValueError(f"NAME must be one of {', '.join(known)} or all; got {parsed.name!r}")
    chosen = list(known.values()) if parsed.name == "all" else [known[parsed.name]]
    parts = [part for exhibit in chosen for part in exhibit.parts]
    _check_names(parsed.name, "row", parsed.rows, {row for part in parts for row in part.rows})
    _check_names(parsed.name, "experiment", parsed.experiments, {part.experiment for part in parts})
    chosen_parts = [
        part
        for part in parts
        if parsed.experiments is None or part.experiment in parsed.experiments
    ]
    if parsed.rows and not any(set(parsed.rows) & set(part.rows) for part in chosen_parts):
        raise ValueError(
            f"no row {', '.join(parsed.rows)} is in {', '.join(parsed.experiments or ())}; leave "
            "--rows or --experiments out"
        )
    command = shlex.join(["maha", "reproduce", *arguments])
    if parsed.results.exists() and not parsed.results.is_dir():
        raise ValueError(f"--results must be a folder; {parsed.results} is a file")
    selection = Selection(
        budget=parsed.budget,
        device=_device(parsed.device),
        results=parsed.results,
        runs=parsed.runs,
        seeds=parsed.seeds,
        rows=parsed.rows,
        experiments=parsed.experiments,
        shares_device=parsed.shared_device,
    )
    if provenance(command, {}, selection.device)["commit"] is None:
        raise ValueError(
            "the commit of this code is unknown, and results without it are refused; run it in a "
            "git checkout, or set MAHA_COMMIT"
        )
    return Options(chosen, selection, parsed.time_limit, command)


def reproduce(options: Options) -> Outcome:
    """Run what is missing, and show how far it is."""
    console = Console()
    todo = jobs(options.exhibits, experiments(), options.selection)
    limit = options.time_limit_s
    clock = Clock(deadline=None if limit is None else time.monotonic() + limit)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("{task.fields[note]}")),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        overall = progress.add_task("runs", total=len(todo), note="")
        current = progress.add_task("", total=None, note="")

        def show(done: int, total: int, note: str) -> None:
            progress.update(current, completed=done, total=total, note=note)

        def tell(job: Job, what: str) -> None:
            if what == "started":
                progress.reset(current, description=job.name, total=None, note="starting")
            else:
                console.print(f"{job.name}: {what}", highlight=False)
                progress.advance(overall)

        clock = replace(clock, show=show)
        _quiet_libraries()
        outcome = run_missing(todo, options.selection.results, options.command, clock, tell)
        progress.update(overall, completed=len(todo) - len(outcome.left))
        progress.remove_task(current)
    console.print(_summary(outcome, options.selection.results), highlight=False)
    return outcome


def _summary(outcome: Outcome, results: Path) -> str:
    kept = f"{len(outcome.kept)} there already"
    if outcome.kept:
        kept += f" (to run one again, delete its file in {results})"
    parts = [f"{len(outcome.done)} run(s) done", kept]
    if outcome.left:
        parts.append(f"{len(outcome.left)} left for the next time: the same command goes on")
    lines = [", ".join(parts) + "."]
    lines += [f"made again: {name}: {what}" for name, what in outcome.changed.items()]
    lines += [f"FAILED {name}: {message}" for name, message in outcome.failed.items()]
    return "\n".join(lines)


def _check_names(exhibit: str, kind: str, given: list[str] | None, known: set[str]) -> None:
    if strange := sorted(set(given or ()) - known):
        raise ValueError(
            f"{exhibit} has no {kind} {', '.join(strange)}; it has {', '.join(sorted(known))}"
        )


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 0, as 1,2; got {text!r}")
    return [int(part) for part in parts]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0; got {text!r}")
    return seconds


def _names(text: str) -> list[str]:
    return text.split(",")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no CUDA device here; use --device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _quiet_libraries() -> None:
    """Leave the terminal to our own progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
