"""The work of `maha train`, `maha eval` and `maha generate`: from a recipe to a run and a result.

What the user got wrong raises ValueError before the run folder is touched.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from maha_attn.data.tokenizer import load_tokenizer
from maha_attn.tasks import TASKS, Task
from maha_attn.training.distributed import main_process_alone, main_process_first, wait_for_all
from maha_attn.training.model import (
    build_model,
    load_saved,
    require_able,
    require_adaptable,
    require_fitting,
    require_vocabulary,
    saved_model,
    set_vocabulary,
    with_pretrained,
)
from maha_attn.training.recipe import Recipe, parse_recipe, read_recipe, recipe_parser
from maha_attn.training.run_folder import RunFolder, create_run, environment, resume_run
from maha_attn.training.train import train_model


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `maha train` takes beside a recipe's settings.

    Args:
        variants: Changes of the recipe to apply, by name.
        seeds: Repeat the run with each; None: as the recipe says.
        pretrained: Run or saved model to start from; None: as the recipe says.
        overwrite: Replace run folders.
        resume: Continue from the last checkpoint; of several seeds, those that are not finished.
    """

    variants: list[str] | None = None
    seeds: list[int] | None = None
    pretrained: str | None = None
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe, read and checked, with its data: all that can be wrong has been found.

    Args:
        task: The data, and how a model is judged.
        recipes: One a seed.
        pretrained: The saved model to start from.
        folder: Of the run, or of the runs of all seeds.
        flags: How to treat run folders.
    """

    task: Task
    recipes: list[Recipe]
    pretrained: Path | None
    folder: Path
    flags: Flags


def find_task(recipe: dict[str, Any]) -> type[Task]:
    """The task of a recipe.

    Raises:
        ValueError: There is no such task.
    """
    name = recipe["task"]
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def plan(path: str, overrides: list[str], flags: Flags) -> Plan:
    """Read a recipe and its data.

    Args:
        path: The recipe's path, here or among those of the package.
        overrides: Command-line arguments such as ``--train.max_steps=10``.
        flags: Those that are no settings of the recipe.

    Raises:
        ValueError: Something in them, or in the data, is wrong.
    """
    raw = read_recipe(path, flags.variants)
    task = find_task(raw)
    raw["pretrained"] = flags.pretrained or raw.get("pretrained")
    seeds = flags.seeds or raw.get("seeds")
    if seeds and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {', '.join(map(str, seeds))}")
    pretrained = None
    if raw["pretrained"]:
        pretrained = saved_model(raw["pretrained"], task.model_class)
        raw["model"] = with_pretrained(raw.get("model") or {}, pretrained)
    parser = recipe_parser(task.sections(), prog="maha train")
    first = parse_recipe(parser, raw, path, overrides)
    folder = Path(first.train.output_dir or "")
    recipes = [first]
    if seeds:
        places = [
            [f"--train.seed={s}", f"--train.output_dir={folder / f'seed-{s}'}"] for s in seeds
        ]
        recipes = [parse_recipe(parser, raw, path, [*overrides, *place]) for place in places]
    data = first.data
    if pretrained is not None:
        require_fitting(task.model_class, first.model, task.causal, pretrained)
        data = replace(data, tokenizer=data.tokenizer or str(pretrained))
    if first.train.shard and first.lora.rank is not None:
        raise ValueError(
            "train.shard and lora.rank cannot be combined: adapters are small; leave train.shard "
            "out (every process holds the model), or train all weights without lora.rank"
        )
    if first.lora.rank is not None:
        require_adaptable(task.model_class, first.model, first.lora, pretrained)
    chosen = (raw.get("model") or {}).get("causal", task.causal)
    if any(override.startswith("--model.causal") for override in overrides):
        chosen = first.model.causal
    if task.causal not in (None, chosen):
        raise ValueError(
            f"model.causal is {str(task.causal).lower()} in every {task.model_class.__name__} of "
            f"the task {raw['task']}; leave it out"
        )
    made = main_process_first(lambda: task(replace(first, data=data)))
    measures = {"loss", *made.measures()}
    if (first.train.metric_for_best_model or "loss").removeprefix("eval_") not in measures:
        raise ValueError(
            f"train.metric_for_best_model must be one of {', '.join(sorted(measures))} in the task "
            f"{raw['task']}, got {first.train.metric_for_best_model!r}"
        )
    for recipe in recipes:
        set_vocabulary(recipe.model, made.tokenizer, pretrained)
        recipe.settings["model"]["vocab_size"] = recipe.model.vocab_size
        made.configure(recipe.model)
        if task.causal is not None:
            recipe.settings["model"]["causal"] = task.causal
    require_able(task.model_class, first.model, made.longest, made.pads)
    return Plan(task=made, recipes=recipes, pretrained=pretrained, folder=folder, flags=flags)


def open_folders(todo: Plan) -> list[tuple[RunFolder, bool]]:
    """The run folders of a plan, and which of them are to be resumed.

    Raises:
        ValueError: A folder holds something that must not be touched, or nothing to resume.
        RunError: A checkpoint belongs to another run; or, but in the main process, that failed.
    """
    single = len(todo.recipes) == 1
    folders = [RunFolder(Path(recipe.train.output_dir or "")) for recipe in todo.recipes]
    resumed = [
        todo.flags.resume and (single or run.last_checkpoint() is not None) for run in folders
    ]

    def prepare() -> None:
        for run, resume, recipe in zip(folders, resumed, todo.recipes, strict=True):
            if resume:
                resume_run(str(run.path), recipe.settings)
            else:
                overwrite = todo.flags.overwrite or todo.flags.resume
                create_run(str(run.path), recipe.settings, overwrite)

    wait_for_all()  # The others have looked before the main process changes anything.
    main_process_alone(prepare)
    return list(zip(folders, resumed, strict=True))


def learn(recipe: Recipe, todo: Plan, run: RunFolder, resume: bool) -> PreTrainedModel:
    """Train one model; every process calls it.

    Raises:
        RunError: A checkpoint cannot be resumed from, or the disk is full.
    """
    set_seed(recipe.train.seed)
    model = build_model(todo.task.model_class, recipe.model, todo.pretrained)
    examples = main_process_first(lambda: todo.task.examples(model))
    return train_model(model, recipe.train, examples, run, recipe.lora, resume)


def judge(task: Task, model: PreTrainedModel, recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """Evaluate a model and keep the result in its run folder."""
    settings = {**recipe.settings["data"], **recipe.settings["evaluation"]}
    result = {"task": recipe.settings["task"], "settings": settings, **task.evaluate(model)}
    run.evaluation.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def summarise(todo: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every metric over the seeds, kept in summary.json."""
    metrics = {}
    for part, values in results[0]["metrics"].items():
        for name in values:
            found = [result["metrics"][part][name] for result in results]
            metrics.setdefault(part, {})[name] = {
                "mean": float(np.mean(found)),
                "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
                "values": found,
            }
    summary = {
        **environment(),
        "seeds": [recipe.train.seed for recipe in todo.recipes],
        "metrics": metrics,
    }
    (todo.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def stored_recipe(run: RunFolder, changes: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a run, with the run's own tokenizer and other evaluation settings if given."""
    settings = run.settings()
    if changes:
        settings["evaluation"] |= changes
    parser = recipe_parser(find_task(settings).sections())
    recipe = parse_recipe(parser, settings, str(run.recipe), [])
    return replace(recipe, data=replace(recipe.data, tokenizer=str(run.model)))


def load_model(run: RunFolder) -> tuple[type[Task], PreTrainedModel, PreTrainedTokenizerFast]:
    """A run's task, its model, on the GPU where there is one, and its tokenizer.

    Raises:
        ValueError: One of them is damaged, or they do not belong together.
    """
    task = find_task(run.settings())
    tokenizer = load_tokenizer(run.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_saved(task.model_class, run.model, device)
    require_vocabulary(tokenizer, model.config, run.model)
    return task, model, tokenizer


def section_settings(recipe: dict[str, Any], section: str) -> tuple[type, dict[str, Any]]:
    """The class of a section of a run's recipe, and its values there."""
    kind = find_task(recipe).sections()[section]
    known = {field.name for field in fields(kind)}
    return kind, {name: value for name, value in recipe[section].items() if name in known}
