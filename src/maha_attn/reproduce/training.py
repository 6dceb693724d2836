"""The kind ``training``: train a model by a recipe of any task, judge it, return the result."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from maha_attn.baselines import ATTENTIONS
from maha_attn.models import MahaConfig
from maha_attn.reproduce.books import judge_on_books
from maha_attn.reproduce.job import Clock, Job
from maha_attn.tasks import Task
from maha_attn.tasks.runs import find_task
from maha_attn.training.checkpoint import RunError
from maha_attn.training.model import build_model, saved_model, set_vocabulary, with_pretrained
from maha_attn.training.recipe import Recipe, parse_recipe, read_recipe, recipe_parser
from maha_attn.training.run_folder import RunFolder, create_run, resume_run
from maha_attn.training.train import train_model

Judge = Callable[[Task, PreTrainedModel, Recipe], dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """A row, ready to train.

    Attributes:
        recipe: Its complete settings.
        task: The data, shared by all rows of a table.
        pretrained: The saved model that it starts from.
    """

    recipe: Recipe
    task: Task
    pretrained: Path | None


def train_and_judge(job: Job, clock: Clock) -> dict[str, Any] | None:
    """Train, evaluate, and return the result; None: stopped by the clock, to be continued."""
    setup = prepare(job)
    recipe, task = setup.recipe, setup.task
    run = _run_folder(job, recipe)
    watch = _Watch(clock)
    set_seed(recipe.train.seed)
    model = build_model(task.model_class, recipe.model, setup.pretrained)
    with _peak_memory(job.device) as peak:
        model = train_model(
            model,
            recipe.train,
            task.examples(model),
            run,
            recipe.lora,
            resume=run.last_checkpoint() is not None,
            callbacks=[watch],
        )
    if watch.stopped:
        shutil.rmtree(run.model)
        return None
    clock.show(1, 1, "evaluating")
    curves = _curves(run, recipe)
    speed = curves.pop("tokens_per_s")
    result = JUDGES.get(recipe.settings["task"], judge_by_task)(task, model, recipe)
    result["metrics"] |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": peak[0],
        "final_loss": curves["loss"][-1],
        "tokens_per_s": None if job.shares_device else speed,
    }
    for checkpoint in run.path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {
        **result,
        "settings": recipe.settings,
        "data": {
            "fingerprint": _fingerprint(task),
            "rows": {name: len(rows) for name, rows in task.rows.items()},
        },
        "curves": curves,
        "limits": ATTENTIONS[recipe.model.layer_type(0)].properties(),
    }


def prepare(job: Job) -> Setup:
    """Read a row's recipe and data, and give it as many parameters as it is to have.

    Raises:
        ValueError: Something in them is wrong, or the parameters cannot be matched.
    """
    setup = _setup(job, job.row)
    reference = job.experiment.match_parameters
    if reference is not None and setup.pretrained is None:
        model, kind = setup.recipe.model, setup.task.model_class
        parameters = count_parameters(_setup(job, reference).recipe.model, kind)
        model.intermediate_size = matched_width(model, parameters, kind)
        setup.recipe.settings["model"]["intermediate_size"] = model.intermediate_size
    return setup


def _setup(job: Job, row: str) -> Setup:
    """A row as its recipe and its settings have it."""
    experiment = job.experiment
    assert experiment.recipe is not None
    raw = read_recipe(experiment.recipe, experiment.budgets[job.budget].variants)
    settings = experiment.merged(row, job.budget) | {
        "train.output_dir": str(job.folder),
        "train.seed": job.seed,
        "train.disable_tqdm": True,
        "train.report_to": "none",
    }
    if job.device.type == "cpu":
        settings |= {"train.use_cpu": True, "train.bf16": False, "train.tf32": None}
    model_class = find_task(raw).model_class
    pretrained = job.pretrained and saved_model(str(job.pretrained), model_class)
    if pretrained is not None:
        raw |= {"pretrained": experiment.pretrained}
        raw["model"] = with_pretrained(raw.get("model") or {}, pretrained)
        settings = {k: v for k, v in settings.items() if not k.startswith("model.")}
    overrides = [f"--{name}={_literal(value)}" for name, value in settings.items()]
    recipe = parse_recipe(_parser(raw["task"]), raw, experiment.recipe, overrides)
    if (attention := experiment.rows[row].attention) and pretrained is None:
        recipe.model.layer_types = [attention] * recipe.model.num_hidden_layers
        recipe.model.validate_layer_type()
        recipe.settings["model"]["layer_types"] = recipe.model.layer_types
    tokenizer = recipe.data.tokenizer or (pretrained and str(pretrained))
    task = _task(json.dumps(recipe.settings), tokenizer, experiment.recipe)
    set_vocabulary(recipe.model, task.tokenizer, pretrained)
    task.configure(recipe.model)
    return Setup(recipe, task, pretrained)


@cache
def _parser(task: str) -> ArgumentParser:
    """Made once a task: it takes a second."""
    return recipe_parser(find_task({"task": task}).sections())


def _literal(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _task(settings: str, tokenizer: str | None, path: str) -> Task:
    """The task of a recipe, read once as long as nothing changes that it depends on."""
    known = json.loads(settings)
    kept = {name: known[name] for name in ("task", "data", "evaluation", "generation")}
    kept["model"] = {"vocab_size": known["model"]["vocab_size"]}
    return _read_task(json.dumps(kept), tokenizer, path)


@lru_cache(maxsize=1)
def _read_task(settings: str, tokenizer: str | None, path: str) -> Task:
    """Read, check and tokenise the data."""
    known = json.loads(settings)
    recipe = parse_recipe(_parser(known["task"]), known, path, [])
    return find_task(known)(replace(recipe, data=replace(recipe.data, tokenizer=tokenizer)))


def count_parameters(config: MahaConfig, kind: type[PreTrainedModel]) -> int:
    """Parameters of a model, none of them made."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind(config).parameters())


def matched_width(config: MahaConfig, parameters: int, kind: type[PreTrainedModel]) -> int:
    """The ``intermediate_size``, a multiple of 8, that comes closest to a number of parameters.

    Raises:
        ValueError: Even the narrowest feed-forward part leaves more than 2 % too many.
    """
    counts = []
    for width in (8, 16):
        sized = type(config)(**{**config.to_dict(), "intermediate_size": width})
        counts.append(count_parameters(sized, kind))
    width = max(8, 8 * round((parameters - counts[0]) / (counts[1] - counts[0]) + 1))
    found = counts[0] + (width // 8 - 1) * (counts[1] - counts[0])
    if abs(found - parameters) > 0.02 * parameters:
        raise ValueError(
            f"no feed-forward width gives {parameters:,} parameters within 2 %: the closest, "
            f"{width}, gives {found:,}"
        )
    return width


def judge_by_task(task: Task, model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """What the task itself finds, less the metrics of other parts than test, or else validation."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.train.bf16):
        found = task.evaluate(model)
    metrics = found.pop("metrics")
    part = "test" if "test" in metrics else "validation"
    return {**found, "metrics": dict(metrics[part]), "part": part}


JUDGES: dict[str, Judge] = {"language_modeling": judge_on_books}
"""Tasks that are judged by more than they find themselves."""


def _fingerprint(task: Task) -> str:
    """A hash of every row of tokens and of the tokenizer."""
    digest = hashlib.sha256(task.tokenizer.backend_tokenizer.to_str().encode())
    for name, rows in sorted(task.rows.items()):
        digest.update(name.encode())
        digest.update(_content(rows))
    return digest.hexdigest()


def _content(rows: Dataset) -> pa.Buffer:
    """The rows in Arrow's stream format."""
    table = cast(pa.Table, rows.with_format("arrow")[:])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.combine_chunks().replace_schema_metadata(None))
    return sink.getvalue()


def _run_folder(job: Job, recipe: Recipe) -> RunFolder:
    """The folder of an interrupted run that these settings can continue, or a new one."""
    if RunFolder(job.folder).last_checkpoint() is not None:
        try:
            return resume_run(str(job.folder), recipe.settings)
        except (ValueError, RunError):
            pass  # Of other settings, or damaged: begun anew.
    return create_run(str(job.folder), recipe.settings, overwrite=True)


class _Watch(TrainerCallback):
    """Shows progress, and has a checkpoint written when the time is up."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.stopped = clock, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, unless it is the last one."""
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        note = next((f"loss {loss:.3f}" for loss in losses), "")
        self.clock.show(state.global_step, state.max_steps, note)
        if self.clock.is_up and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Most memory allocated meanwhile, in bytes, as the one item of a list; None on a CPU."""
    found: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device)


def _curves(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What training logged: ``steps``, ``loss``; of packed rows also ``tokens`` and their speed.

    The Trainer waits for the device whenever it logs, so the time between two lines is that of the
    work; the median leaves out the first ones and those in which a checkpoint was written.
    """
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    curves = {"steps": [line["step"] for line in lines], "loss": [line["loss"] for line in lines]}
    length = recipe.settings["data"].get("sequence_length")
    if length is None:
        return curves | {"tokens_per_s": None}
    per_step = length * recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps
    speeds = [
        (after["step"] - before["step"]) * per_step / (after["elapsed_s"] - before["elapsed_s"])
        for before, after in pairwise(lines)
        if after["elapsed_s"] > before["elapsed_s"]
    ]
    return curves | {
        "tokens": [step * per_step for step in curves["steps"]],
        "tokens_per_s": float(np.median(speeds)) if speeds else None,
    }
