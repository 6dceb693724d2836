"""What ``maha train``, ``maha eval`` and ``maha generate`` are told: their arguments and help."""

import argparse
import sys
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from maha_attn.evaluation.generation import GenerationSettings
from maha_attn.tasks import TASKS
from maha_attn.tasks.runs import Flags, find_task, section_settings
from maha_attn.training.recipe import HelpFormatter, print_help, read_recipe, recipe_parser
from maha_attn.training.run_folder import RunFolder, open_run

DEFAULT = {"task": "language_modeling"}
"""What the help is of where neither a task nor a recipe or run is named."""
TRAIN_HELP = """\
Train a model by a recipe, then evaluate it.

RECIPE is a YAML file with the complete settings of a run: the task, and the sections model, data,
train, lora, evaluation and generation. Each setting can be overridden by its name. The train
section takes every option of transformers' TrainingArguments; those that matter most are listed
below. The sections data and evaluation depend on the task: below are those of language_modeling;
`maha train --help TASK` shows those of masked_language_modeling, sequence_classification,
question_answering or translation.

  --variant NAME       change the recipe as its variant NAME says (smoke, full, …); repeatable
  --seeds 1,2,3        repeat the run with each seed; summary.json has means and spreads
  --pretrained FOLDER  start from the weights and the tokenizer of a run
  --overwrite          replace the run folder if there is one
  --resume             continue from the run folder's last checkpoint

examples:
  maha train recipes/demo.yaml
  maha train recipes/demo.yaml --train.max_steps=20 --train.output_dir=runs/short
  maha train recipes/demo.yaml --data.train='[my-book.txt]' --train.output_dir=runs/my-book
  maha train recipes/sst2.yaml --data.train=my.csv --data.validation=more.csv --data.test=null
  maha train recipes/mlm.yaml
  maha train recipes/sst2.yaml --pretrained runs/mlm --seeds 1,2,3
  maha train recipes/demo.yaml --print_config     show all settings and stop
"""
EVAL_HELP = """\
Score a trained model on what its recipe holds out: a language model by its perplexity, beside
unigram and bigram models of its training text, other models by the measures of their task. Writes
evaluation.json (and for language models scales.png) into the run folder.

The options depend on the task: `maha eval --help TASK` shows those of language_modeling (also where
no TASK is named), masked_language_modeling, sequence_classification, question_answering or
translation; `maha eval RUN --help` those of a run, with what its recipe says.

examples:
  maha eval runs/demo
  maha eval --help question_answering
  maha eval runs/demo --stride 256     score each token with at least half a window before it
  maha eval runs/squad --no_answer_threshold 1.5
"""
GENERATE_HELP = """\
Continue a text, or translate one. What is not given is taken from the generation section of the
run's recipe; `maha generate RUN --help` shows it.

examples:
  maha generate runs/demo "It was a fine morning"
  maha generate runs/demo "It was" --max_new_tokens 300 --temperature 0.6 --seed 1
  maha generate runs/translation "A dog runs through the snow."
"""


def parse_train(arguments: list[str]) -> tuple[str, Flags, list[str]]:
    """Read the arguments of ``maha train``, or print its help and exit.

    Returns:
        The recipe's path, what is no setting of it, and the settings that override its own.

    Raises:
        ValueError: The first argument is no recipe.
        ArgumentError: A flag is wrong.
    """
    named = _first_name(arguments)
    if not arguments or _asks_for_help(arguments):
        recipe = {"task": named} if named in TASKS else named and read_recipe(named)
        task = find_task(recipe or DEFAULT)
        usage = "maha train RECIPE [FLAG ...] [--SECTION.SETTING VALUE ...]"
        print_help(recipe_parser(task.sections(), usage=usage, description=TRAIN_HELP))
        sys.exit()
    if named is None or named != arguments[0]:
        raise ValueError(f"expected the recipe first, got {arguments[0]}; see maha train --help")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--overwrite", action="store_true")
    how.add_argument("--resume", action="store_true")
    parser.add_argument("--variant", action="append", dest="variants")
    parser.add_argument("--seeds", type=seeds)
    parser.add_argument("--pretrained")
    flags, overrides = parser.parse_known_args(arguments[1:])
    return named, Flags(**vars(flags)), overrides


def parse_eval(arguments: list[str]) -> tuple[RunFolder, Any]:
    """Read the arguments of ``maha eval``, or print its help and exit.

    Returns:
        The run and its evaluation settings, as its task has them.

    Raises:
        ValueError: There is no such run.
        ArgumentError: A setting is unknown or wrong.
    """
    return _parse_run("eval", EVAL_HELP, arguments, "evaluation")


def parse_generate(arguments: list[str]) -> tuple[RunFolder, GenerationSettings]:
    """Read the arguments of ``maha generate``, or print its help and exit.

    Returns:
        The run and its generation settings.

    Raises:
        ValueError: There is no such run.
        ArgumentError: A setting is unknown or wrong, or there is no prompt.
    """
    prompt = {"prompt": "the text to continue or to translate"}
    return _parse_run("generate", GENERATE_HELP, arguments, "generation", prompt)


def _parse_run(
    command: str,
    description: str,
    arguments: list[str],
    section: str,
    positionals: dict[str, str] | None = None,
) -> tuple[RunFolder, Any]:
    """Read the arguments of a command that works on a run.

    Args:
        command: Its name.
        description: The top of its help.
        arguments: Its arguments.
        section: The section of the run's recipe where the defaults stand.
        positionals: Its fields that are given without a name, and what to say of them.

    Returns:
        The run and the section's settings.
    """
    positionals = positionals or {}
    named = _first_name(arguments)
    if named is None or (named in TASKS and _asks_for_help(arguments)):
        run, recipe = None, {"task": named or DEFAULT["task"], section: {}}
    else:
        run = open_run(named)
        recipe = run.settings()
    settings, stored = section_settings(recipe, section)
    parser = ArgumentParser(
        prog=f"maha {command}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("run", help="a run folder, made by `maha train`")
    for name, explanation in positionals.items():
        parser.add_argument(name, type=str, help=explanation)
    parser.add_class_arguments(settings, skip=set(positionals))
    parser.set_defaults({name: v for name, v in stored.items() if name not in positionals})
    parsed = parser.parse_args(arguments)
    assert run is not None
    return run, settings(**{field.name: parsed[field.name] for field in fields(settings)})


def _asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def _first_name(arguments: list[str]) -> str | None:
    """The first argument that is no option."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def seeds(text: str) -> list[int]:
    """``1,2,3``; argparse names this function where it fails."""
    return [int(seed) for seed in text.split(",")]
