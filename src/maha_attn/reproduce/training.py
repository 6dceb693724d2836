"""The kind ``training``: train a model by a recipe of any task, judge it, return the result."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from maha_attn.baselines import ATTENTIONS
from maha_attn.reproduce.books import explain_passage, judge_on_books
from maha_attn.reproduce.job import Clock, Job
from maha_attn.reproduce.setup import prepare
from maha_attn.tasks import Task
from maha_attn.training.checkpoint import RunError
from maha_attn.training.divergence import DivergedError
from maha_attn.training.model import build_model
from maha_attn.training.recipe import Recipe
from maha_attn.training.run_folder import RunFolder, create_run, resume_run
from maha_attn.training.train import train_model

Judge = Callable[[Task, PreTrainedModel, Recipe], dict[str, Any]]


def train_and_judge(job: Job, clock: Clock) -> dict[str, Any] | None:
    """Train, evaluate, and return the result; None: stopped by the clock, to be continued.

    That training diverged is a result too: ``diverged`` says after which step; nothing is judged.
    """
    setup = prepare(job)
    recipe, task = setup.recipe, setup.task
    run = _run_folder(job, recipe)
    watch = _Watch(clock)
    set_seed(recipe.train.seed)
    model = build_model(task.model_class, recipe.model, setup.pretrained)
    diverged = None
    with _peak_memory(job.device) as peak:
        try:
            model = train_model(
                model,
                recipe.train,
                task.examples(model),
                run,
                recipe.lora,
                resume=run.last_checkpoint() is not None,
                callbacks=[watch],
            )
        except DivergedError as error:
            diverged = error.step
    if watch.stopped:
        shutil.rmtree(run.model)
        return None
    clock.show(1, 1, "evaluating")
    curves = _curves(run, recipe)
    result: dict[str, Any] = {"metrics": {}, "diverged": diverged}
    if diverged is None:
        result = JUDGES.get(recipe.settings["task"], judge_by_task)(task, model, recipe)
        if job.explains:
            result["attention"] = explain_passage(task, model, recipe)
        result["metrics"]["final_loss"] = curves["loss"][-1]
    result["metrics"] |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": peak[0],
        **_speeds(run, recipe, shared=job.shares_device),
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


def judge_by_task(task: Task, model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """What the task itself finds, less what is of other parts than test, or else validation."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.train.bf16):
        found = task.evaluate(model)
    metrics, examples = found.pop("metrics"), found.pop("examples", {})
    part = "test" if "test" in metrics else "validation"
    return {**found, "metrics": dict(metrics[part]), "part": part, **examples.get(part, {})}


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
    """What training logged: ``steps``, ``loss``; of packed rows also ``tokens``."""
    lines = [line for line in _logged(run) if math.isfinite(line.get("loss", math.nan))]
    curves = {"steps": [line["step"] for line in lines], "loss": [line["loss"] for line in lines]}
    length = recipe.settings["data"].get("sequence_length")
    if length is None:
        return curves
    return curves | {"tokens": [step * length * _rows_a_step(recipe) for step in curves["steps"]]}


def _speeds(run: RunFolder, recipe: Recipe, *, shared: bool) -> dict[str, float | None]:
    """``sequences_per_s`` and, of packed rows, ``tokens_per_s`` of training; None where shared.

    The Trainer waits for the device whenever it logs, so the time between two lines is that of the
    work; the median leaves out the first ones and those in which a checkpoint was written.
    Intervals in which the model was evaluated do not count.
    """
    speeds, before = [], None
    for line in _logged(run):
        if "loss" not in line:  # An evaluation: the time to the next line is not training's.
            before = None
            continue
        if before is not None and line["elapsed_s"] > before["elapsed_s"]:
            rows = (line["step"] - before["step"]) * _rows_a_step(recipe)
            speeds.append(rows / (line["elapsed_s"] - before["elapsed_s"]))
        before = line
    speed = None if shared or not speeds else float(np.median(speeds))
    length = recipe.settings["data"].get("sequence_length")
    tokens = None if speed is None or length is None else speed * length
    return {"sequences_per_s": speed, "tokens_per_s": tokens}


def _logged(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def _rows_a_step(recipe: Recipe) -> int:
    return recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps
