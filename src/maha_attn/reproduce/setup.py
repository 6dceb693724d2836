"""A row's recipe, of equal parameters, and its data: what a run of the kind ``training`` needs."""

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from maha_attn.experiments.comparison import PARAMETERS_WITHIN
from maha_attn.experiments.definition import Experiment
from maha_attn.models.parameters import count_parameters, matched_intermediate_size
from maha_attn.reproduce.job import Job
from maha_attn.tasks import Task
from maha_attn.tasks.runs import find_task
from maha_attn.training.model import saved_model, set_vocabulary, with_pretrained
from maha_attn.training.recipe import Recipe, parse_recipe, read_recipe, recipe_parser


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


def prepare(job: Job) -> Setup:
    """Read a row's recipe and data.

    Raises:
        ValueError: Something in them is wrong, or the parameters cannot be matched.
    """
    recipe = row_recipe(job)
    pretrained = _starts_from(job, find_task(recipe.settings))
    tokenizer = recipe.data.tokenizer or (pretrained and str(pretrained))
    assert job.experiment.recipe is not None
    task = _task(recipe.settings, tokenizer, job.experiment.recipe)
    set_vocabulary(recipe.model, task.tokenizer, pretrained)
    task.configure(recipe.model)
    return Setup(recipe, task, pretrained)


def row_recipe(job: Job) -> Recipe:
    """A row's complete settings, with as many parameters as it is to have; no data are read.

    The vocabulary is that of the recipe: a tokenizer that has fewer tokens takes as much from the
    row as from the one that it is matched with.

    Raises:
        ValueError: As `prepare`.
    """
    recipe = _as_defined(job)
    if job.experiment.match_parameters is not None and job.pretrained is None:
        kind = find_task(recipe.settings).model_class
        parameters = _parameters_to_match(job.experiment, job.budget, job.device)
        width = matched_intermediate_size(recipe.model, parameters, kind, within=PARAMETERS_WITHIN)
        recipe.model.intermediate_size = width
        recipe.settings["model"]["intermediate_size"] = width
    return recipe


def row_settings(job: Job) -> dict[str, Any]:
    """What a result of today's recipe would have as its settings.

    The model of a run that starts from another is that one's, and is compared there.
    """
    settings = row_recipe(replace(job, pretrained=None)).settings
    if job.pretrained is not None:
        del settings["model"]
    return settings


@cache
def _parameters_to_match(experiment: Experiment, budget: str, device: torch.device) -> int:
    """Those of the experiment's reference."""
    row = experiment.match_parameters
    assert row is not None
    kept = {"experiment": experiment, "budget": budget, "device": device}
    recipe = _as_defined(Job(row=row, seed=0, folder=Path(), **kept))
    return count_parameters(recipe.model, find_task(recipe.settings).model_class)


def _as_defined(job: Job) -> Recipe:
    """A row as its recipe and its settings have it."""
    experiment, row = job.experiment, job.row
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
    if (model := _starts_from(job, find_task(raw))) is not None:
        raw |= {"pretrained": experiment.pretrained}
        raw["model"] = with_pretrained(raw.get("model") or {}, model)
        settings = {k: v for k, v in settings.items() if not k.startswith("model.")}
    overrides = [f"--{name}={_literal(value)}" for name, value in settings.items()]
    recipe = parse_recipe(_parser(raw["task"]), raw, experiment.recipe, overrides)
    if (attention := experiment.rows[row].attention) and job.pretrained is None:
        recipe.model.layer_types = [attention] * recipe.model.num_hidden_layers
        recipe.model.validate_layer_type()
        recipe.settings["model"]["layer_types"] = recipe.model.layer_types
    return recipe


def _starts_from(job: Job, task: type[Task]) -> Path | None:
    """The saved model that a run starts from."""
    base = job.pretrained
    return None if base is None else saved_model(str(base.folder), task.model_class)


@cache
def _parser(task: str) -> ArgumentParser:
    """Made once a task: it takes a second."""
    return recipe_parser(find_task({"task": task}).sections())


def _literal(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _task(settings: dict[str, Any], tokenizer: str | None, path: str) -> Task:
    """The task of a recipe, read once as long as nothing changes that it depends on."""
    kept = {name: settings[name] for name in ("task", "data", "evaluation", "generation")}
    kept["model"] = {"vocab_size": settings["model"]["vocab_size"]}
    return _read_task(json.dumps(kept), tokenizer, path)


@lru_cache(maxsize=1)
def _read_task(settings: str, tokenizer: str | None, path: str) -> Task:
    """Read, check and tokenise the data."""
    known = json.loads(settings)
    recipe = parse_recipe(_parser(known["task"]), known, path, [])
    return find_task(known)(replace(recipe, data=replace(recipe.data, tokenizer=tokenizer)))
