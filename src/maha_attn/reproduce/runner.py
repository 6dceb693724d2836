"""Runs what is missing, one run after the other in one process, and keeps each result at once."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maha_attn.bench.measure import provenance
from maha_attn.experiments.comparison import differences, matter
from maha_attn.experiments.definition import Exhibit, Experiment
from maha_attn.experiments.results import RefusedError, read_result, read_results, write_result
from maha_attn.reproduce.job import Clock, Job
from maha_attn.training.run_folder import environment

PACKAGES = (
    *("maha-attn", "transformers", "tokenizers", "datasets", "accelerate", "numpy"),
    *("scikit-learn", "sacrebleu"),  # which compute scores
    *("performer-pytorch", "linformer"),  # which are baselines, and which bring their kernels:
    *("flash-linear-attention", "mamba-ssm", "causal-conv1d", "kernels"),
)
"""Whose versions a result names; ``none`` where one is not installed."""
NUMBER_FORMATS = ("train.bf16", "train.tf32")


class Kind(NamedTuple):
    """What a kind of experiment does.

    Attributes:
        run: Does a run; returns what its result holds, or None where the clock stopped it.
        settings: Of a job: what its result would have as ``settings``, as far as a recipe says.
    """

    run: Callable[[Job, Clock], dict[str, Any] | None]
    settings: Callable[[Job], dict[str, Any]]


def kinds() -> dict[str, Kind]:
    """The kinds of experiments by name."""
    from maha_attn.reproduce.cost import cost_settings, measure_cost
    from maha_attn.reproduce.flops import count_flops, flops_settings
    from maha_attn.reproduce.setup import row_settings
    from maha_attn.reproduce.training import train_and_judge

    return {
        "cost": Kind(measure_cost, cost_settings),
        "flops": Kind(count_flops, flops_settings),
        "training": Kind(train_and_judge, row_settings),
    }


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

    def want(experiment: Experiment, row: str, seed: int, keeps_model: bool = False) -> Job:
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
        return found[key]

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
    """What became of the runs.

    Attributes:
        changed: Of runs whose result was of another recipe: what differs.
    """

    done: list[Job] = field(default_factory=list)
    kept: list[Job] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)


def run_missing(
    todo: Sequence[Job],
    results: Path,
    command: str,
    clock: Clock,
    tell: Callable[[Job, str], None] = lambda job, what: None,
) -> Outcome:
    """Run every job without a result file of today's settings; a refused file is made again.

    Args:
        todo: The jobs.
        results: Folder of the result files.
        command: What the user typed, for the files.
        clock: Its deadline ends the run in progress at a checkpoint and starts no other.
        tell: Called with a job and what happens to it.
    """
    outcome, run = Outcome(), kinds()
    for job in todo:
        changes = changed(job, results)
        if changes == [] and not _lacks_model(job, todo, results):
            outcome.kept.append(job)
            continue
        if changes:
            outcome.changed[job.name] = "; ".join(changes)
        if clock.is_up:
            outcome.left.append(job)
            continue
        if obstacle := _obstacle(job, results):
            outcome.failed[job.name] = obstacle
            tell(job, f"not run: {obstacle}")
            continue
        tell(job, "started")
        start = time.perf_counter()
        try:
            found = run[job.experiment.kind].run(job, clock)
            elapsed = round(time.perf_counter() - start, 1)
            if found is not None:
                write_result(job.result(results), _document(job, found, results, command, elapsed))
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


def changed(job: Job, results: Path) -> list[str] | None:
    """How the settings of a job's result differ from those that it would have today.

    A result of another class of device than the job's stays: number formats are not compared then.

    Returns:
        The differences, none where the result is up to date; None: there is no valid result.
    """
    try:
        result = read_result(job.result(results))
    except RefusedError:
        return None
    before = matter(result["settings"])
    if result["device_class"] != device_class(job.device):
        before = {name: value for name, value in before.items() if name not in NUMBER_FORMATS}
    return differences(before, matter(kinds()[job.experiment.kind].settings(job)))


def device_class(device: torch.device) -> str:
    """``gpu`` or ``cpu``."""
    return "gpu" if device.type == "cuda" else "cpu"


def _obstacle(job: Job, results: Path) -> str:
    """Why a run would be of no use; empty: nothing."""
    if job.pretrained is not None and _diverged(job.pretrained, results):
        return f"what it would start from, {job.pretrained.name}, diverged"
    if job.experiment.kind == "flops":  # Counted on shapes.
        return ""
    own, folder = device_class(job.device), job.result(results).parent
    there = {r["device_class"] for r in read_results(folder, results)[0]}
    if there and own not in there:
        return (
            f"{folder} has results of another class of device, {', '.join(there)}, which would be "
            f"refused beside this one's, {own}; give another folder with --results"
        )
    return ""


def _diverged(job: Job, results: Path) -> bool:
    """Its result says so."""
    try:
        return read_result(job.result(results)).diverged is not None
    except RefusedError:
        return False


def _lacks_model(job: Job, todo: Sequence[Job], results: Path) -> bool:
    """Another run is to start from its model, which is not there."""
    if not job.keeps_model or job.model.is_file() or _diverged(job, results):
        return False
    waiting = (other for other in todo if other.pretrained and other.pretrained.name == job.name)
    return any(changed(other, results) != [] for other in waiting)


def _document(
    job: Job, found: dict[str, Any], results: Path, command: str, elapsed: float
) -> dict[str, Any]:
    """The result file's content."""
    document = provenance(command, found["settings"], job.device)
    if job.device.type == "cpu":
        document["device"] = f"{environment()['device_name']}, threads: {torch.get_num_threads()}"
    document["versions"] |= {name: _version(name) for name in PACKAGES}
    return {
        "experiment": job.experiment.name,
        "row": job.row,
        "label": job.experiment.rows[job.row].label,
        "budget": job.budget,
        "seed": job.seed,
        **document,
        "device_class": device_class(job.device),
        "wall_s": elapsed,
        **_models(job, results),
        **{name: value for name, value in found.items() if name != "settings"},
    }


def _models(job: Job, results: Path) -> dict[str, Any]:
    """Which weights the run started from, and those that others start from, by their SHA-256."""
    named: dict[str, Any] = {}
    if job.keeps_model and job.model.is_file():  # A run that diverged has none.
        named["model_sha256"] = _sha256(job.model)
    if (base := job.pretrained) is not None:
        named["pretrained"] = {
            "experiment": base.experiment.name,
            "row": base.row,
            "seed": base.seed,
            "commit": read_result(base.result(results))["commit"],
            "sha256": _sha256(base.model),
        }
    return named


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
