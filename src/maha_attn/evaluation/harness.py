"""Tasks of EleutherAI's lm-evaluation-harness (extra lm_eval) on a model of ours."""

from pathlib import Path
from typing import Any

import yaml
from lm_eval import evaluator, tasks  # pyright: ignore[reportMissingImports]
from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedModel, PreTrainedTokenizerFast


class _PlainLoader(yaml.SafeLoader):
    """Reads a task file whose functions (``!function``) the harness itself looks up."""


_PlainLoader.add_multi_constructor("!", lambda *_: None)


def find_tasks(names: list[str]) -> tuple[Any, list[str]]:
    """The harness's manager of tasks, and the tasks' names in it.

    Args:
        names: As :func:`run_harness` takes them.

    Raises:
        ValueError: There is no such task.
    """
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"evaluation.harness_tasks: task file {str(file)!r} does not exist")
    wanted = [name for name in names if Path(name) not in files]
    for file in files:
        task = yaml.load(file.read_text(encoding="utf-8"), _PlainLoader)
        if not isinstance(task, dict) or "task" not in task:
            raise ValueError(f"evaluation.harness_tasks: {str(file)!r} names no task (task: …)")
        wanted.append(str(task["task"]))
    manager: Any = tasks.TaskManager(
        include_path=[str(file.parent) for file in files],
        include_defaults=len(files) < len(names),  # reading all of its own takes seconds
    )
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise ValueError(f"evaluation.harness_tasks: the harness has no task {unknown[0]!r}")
    return manager, wanted


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: list[str],
    batch_size: int,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        names: YAML files of local tasks, which need no network if their data are local, or names
            of the harness's own, whose data come from the hub.
        batch_size: Requests at once.

    Returns:
        The harness's ``results``: by task, each measure and its standard error.

    Raises:
        ValueError: There is no such task.
    """
    manager, wanted = find_tasks(names)
    harness: Any = huggingface.HFLM
    adapted = harness(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    evaluate: Any = evaluator.simple_evaluate
    return evaluate(adapted, tasks=wanted, task_manager=manager, bootstrap_iters=0)["results"]
