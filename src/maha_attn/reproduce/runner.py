"""Runs what is missing, one run after the other in one process, and keeps each result at once."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from maha_attn.bench.measure import provenance
from maha_attn.experiments.definition import Exhibit, Experiment
from maha_attn.experiments.results import RefusedError, read_result, result_path, write_result
from maha_attn.reproduce.job import Clock, Job
from maha_attn.training.run_folder import environment

PACKAGES = ("maha-attn", "transformers", "tokenizers", "datasets", "accelerate", "numpy")


def kinds() -> dict[str, Callable[[Job, Clock], dict[str, Any] | None]]:
    """What each kind of experiment does with a run; None is returned when the clock stopped it."""
    from maha_attn.reproduce.flops import count_flops
    from maha_attn.reproduce.language_model import train_language_model

    return {"flops": count_flops, "language_model": train_language_model}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which runs of an exhibit.

    Attributes:
        budget: Its name.
        seeds: None: as many of the budget's as the exhibit asks for.
        rows: None: all.
        results: Folder of the result files.
        runs: Folder of the runs that are not finished.
        device: Where they run.
    """

    budget: str
    device: torch.device
    results: Path
    runs: Path
    seeds: list[int] | None = None
    rows: list[str] | None = None


def jobs(
    exhibits: Iterable[Exhibit], experiments: dict[str, Experiment], selection: Selection
) -> list[Job]:
    """Every run that the exhibits need, each once; all rows with the first seed come first."""
    found: dict[tuple[str, str, int], Job] = {}
    for exhibit in exhibits:
        for part in exhibit.parts:
            experiment = experiments[part.experiment]
            if selection.budget not in experiment.budgets:
                continue
            known = experiment.budgets[selection.budget].seeds
            for seed in selection.seeds or known[: part.seeds]:
                for row in part.rows:
                    if selection.rows is None or row in selection.rows:
                        place = experiment.name, selection.budget, f"{row}-seed{seed}"
                        found[experiment.name, row, seed] = Job(
                            experiment=experiment,
                            row=row,
                            seed=seed,
                            budget=selection.budget,
                            folder=selection.runs.joinpath(*place),
                            device=selection.device,
                        )
    return sorted(found.values(), key=lambda job: _rank(job, list(found)))


def _rank(job: Job, order: Sequence[tuple[str, str, int]]) -> tuple[int, int]:
    """Seeds first, then the order in which the exhibits ask."""
    return job.seed, order.index((job.experiment.name, job.row, job.seed))


@dataclass
class Outcome:
    """What became of the runs."""

    done: list[Job] = field(default_factory=list)
    kept: list[Job] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)


def run_missing(
    todo: Sequence[Job],
    results: Path,
    command: str,
    clock: Clock,
    tell: Callable[[Job, str], None] = lambda job, what: None,
) -> Outcome:
    """Run every job without a result file; a file that is refused is made again.

    Args:
        todo: The jobs.
        results: Folder of the result files.
        command: What the user typed, for the files.
        clock: Its deadline ends the run in progress at a checkpoint and starts no other.
        tell: Called with a job and what happens to it.
    """
    outcome, run = Outcome(), kinds()
    for job in todo:
        path = result_path(results, job.experiment.name, job.budget, job.row, job.seed)
        if _is_done(path):
            outcome.kept.append(job)
            continue
        if clock.is_up:
            outcome.left.append(job)
            continue
        tell(job, "started")
        start = time.perf_counter()
        try:
            found = run[job.experiment.kind](job, clock)
            elapsed = round(time.perf_counter() - start, 1)
            if found is not None:
                write_result(path, _document(job, found, command, elapsed))
        except Exception as error:  # One row that fails does not take the others with it.
            message = " ".join(f"{type(error).__name__}: {error}".split())
            outcome.failed[job.name] = message
            tell(job, f"failed: {message}")
            continue
        finally:
            if job.device.type == "cuda":
                torch.cuda.empty_cache()
        if found is None:
            outcome.left.append(job)
            tell(job, "stopped, to be continued")
        else:
            outcome.done.append(job)
            tell(job, f"done in {elapsed:.0f} s")
    return outcome


def _is_done(path: Path) -> bool:
    try:
        return path.is_file() and bool(read_result(path))
    except RefusedError:
        return False


def _document(job: Job, found: dict[str, Any], command: str, elapsed: float) -> dict[str, Any]:
    """The result file's content."""
    document = provenance(command, found["settings"], job.device)
    if job.device.type == "cpu":
        document["device"] = f"{environment()['device_name']}, threads: {torch.get_num_threads()}"
    document["versions"] |= {name: version(name) for name in PACKAGES}
    return {
        "experiment": job.experiment.name,
        "row": job.row,
        "label": job.experiment.rows[job.row].label,
        "budget": job.budget,
        "seed": job.seed,
        **document,
        "device_class": "gpu" if job.device.type == "cuda" else "cpu",
        "wall_s": elapsed,
        **{name: value for name, value in found.items() if name != "settings"},
    }
