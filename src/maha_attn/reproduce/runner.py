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

PACKAGES = (
    *("maha-attn", "transformers", "tokenizers", "datasets", "accelerate", "numpy"),
    *("scikit-learn", "sacrebleu"),
)


def kinds() -> dict[str, Callable[[Job, Clock], dict[str, Any] | None]]:
    """What each kind of experiment does with a run; None is returned when the clock stopped it."""
    from maha_attn.reproduce.cost import measure_cost
    from maha_attn.reproduce.flops import count_flops
    from maha_attn.reproduce.training import train_and_judge

    return {"cost": measure_cost, "flops": count_flops, "training": train_and_judge}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which runs of an exhibit.

    Attributes:
        budget: Its name.
        seeds: None: as many of the budget's as the exhibit asks for.
        rows: None: all.
        experiments: None: all; those that others start from run in any case.
        results: Folder of the result files.
        runs: Folder of the runs that are not finished.
        device: Where they run.
        shares_device: Whether others run there meanwhile.
    """

    budget: str
    device: torch.device
    results: Path
    runs: Path
    seeds: list[int] | None = None
    rows: list[str] | None = None
    experiments: list[str] | None = None
    shares_device: bool = False


def jobs(
    exhibits: Iterable[Exhibit], experiments: dict[str, Experiment], selection: Selection
) -> list[Job]:
    """Every run that the exhibits need, each once.

    All rows with the first seed come first; the run that another one starts from comes before it.
    """
    found: dict[tuple[str, str, int], Job] = {}

    def want(experiment: Experiment, row: str, seed: int, keeps_model: bool = False) -> Path:
        base = None
        if experiment.pretrained is not None:
            start = experiments[experiment.pretrained]
            base = want(start, row, start.budgets[selection.budget].seeds[0], keeps_model=True)
        key = experiment.name, row, seed
        folder = selection.runs / experiment.name / selection.budget / f"{row}-seed{seed}"
        found[key] = Job(
            experiment=experiment,
            row=row,
            seed=seed,
            budget=selection.budget,
            folder=folder,
            device=selection.device,
            shares_device=selection.shares_device,
            pretrained=base,
            keeps_model=keeps_model or (key in found and found[key].keeps_model),
        )
        return folder

    wanted = [
        (seed, experiment, row)
        for exhibit in exhibits
        for part in exhibit.parts
        if selection.experiments is None or part.experiment in selection.experiments
        if selection.budget in (experiment := experiments[part.experiment]).budgets
        for seed in selection.seeds or experiment.budgets[selection.budget].seeds[: part.seeds]
        for row in part.rows
        if selection.rows is None or row in selection.rows
    ]
    for seed, experiment, row in sorted(wanted, key=lambda one: one[0]):
        want(experiment, row, seed)
    return list(found.values())


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
        if _is_done(job, path):
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


def _is_done(job: Job, path: Path) -> bool:
    """It has a result, and its model where another run starts from it."""
    if job.keeps_model and not (job.folder / "model" / "model.safetensors").is_file():
        return False
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
