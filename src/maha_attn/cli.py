"""The command ``maha``: it parses, calls and prints.

What a command needs is imported when it is called, so that ``maha --help`` is quick. What the user
got wrong is told in one line, before any work is begun.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partialmethod
from typing import TYPE_CHECKING, Any

from maha_attn.training.checkpoint import RunError

if TYPE_CHECKING:
    from maha_attn.training.run_folder import RunFolder

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
  maha train recipes/sst2.yaml --data.train=my.csv --data.validation=my-validation.csv
  maha train recipes/mlm.yaml
  maha train recipes/sst2.yaml --pretrained runs/mlm --seeds 1,2,3
  maha train recipes/demo.yaml --print_config     show all settings and stop
"""
EVAL_HELP = """\
Score a trained model on what its recipe holds out: a language model by its perplexity, beside
unigram and bigram models of its training text, other models by the measures of their task. Writes
evaluation.json (and for language models scales.png) into the run folder.

examples:
  maha eval runs/demo
  maha eval runs/demo --stride 256     score each token with at least half a window before it
  maha eval runs/squad --no_answer_threshold 1.5
"""
GENERATE_HELP = """\
Continue a text, or translate one. What is not given is taken from the generation section of the
run's recipe.

examples:
  maha generate runs/demo "It was a fine morning"
  maha generate runs/demo "It was" --max_new_tokens 300 --temperature 0.6 --seed 1
  maha generate runs/translation "A dog runs through the snow."
"""


BENCH_HELP = """\
Measure costs: both sides in turn in one process, medians and spreads, ceilings of the same run.
Prints a table and writes a result file with everything needed to repeat it.

  maha bench ops        attention and fusion from Q, K, V, against full and windowed attention
  maha bench layer      the whole layer, from tokens to tokens
  maha bench decode     one more token by the cache of a long past, against full attention
  maha bench cost       every attention and length: FLOPs, time, throughput, memory
  maha bench qp         the fusion solver: `speed`, or `certificates` of a million problems a set

examples:
  maha bench layer --device cpu --width 256 --heads 4 --tokens 1 --lengths 4096,16384
  maha bench ops --help
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that ``arguments`` (by default those of the process) ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        run, _ = COMMANDS[arguments[0]]
        try:
            run(arguments[1:])
        except KeyboardInterrupt:
            sys.exit("interrupted")
        return
    parser = argparse.ArgumentParser(
        prog="maha",
        description="Language models with multiscale attention: train, evaluate, generate.",
        epilog="`maha COMMAND --help` explains a command and gives examples.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(arguments)


def train(arguments: list[str]) -> None:
    """``maha train``."""
    prog = "maha train"
    with user_errors(prog):
        from maha_attn.tasks import TASKS
        from maha_attn.tasks import runs as work
        from maha_attn.training.distributed import (
            is_main_process,
            leave_process_group,
            num_processes,
        )
        from maha_attn.training.recipe import print_help, recipe_parser

        path, *rest = arguments or ["--help"]
        if path in ("-h", "--help"):
            task = TASKS[rest[0]] if rest and rest[0] in TASKS else TASKS["language_modeling"]
            usage = "maha train RECIPE [FLAG ...] [--SECTION.SETTING VALUE ...]"
            print_help(
                recipe_parser(task.sections(), prog=prog, usage=usage, description=TRAIN_HELP)
            )
            sys.exit()
        if path.startswith("-"):
            raise ValueError(f"expected the recipe first, got {path}; see maha train --help")
        flags, overrides = train_flags(rest)
        quiet_libraries()
        todo = work.plan(path, overrides, work.Flags(**vars(flags)))
        folders = work.open_folders(todo)
    is_main = is_main_process()
    if is_main:
        processes = f"; {n} processes" if (n := num_processes()) > 1 else ""
        print(f"{todo.task.describe()}; run folder {todo.folder}{processes}", flush=True)
    results = []
    for recipe, (run, resume) in zip(todo.recipes, folders, strict=True):
        with user_errors(prog, (RunError,)):
            model = work.learn(recipe, todo, run, resume)
        if recipe is todo.recipes[-1]:
            leave_process_group()
        if is_main:
            results.append(work.judge(todo.task, model, recipe, run))
            show(run, results[-1])
    if len(results) > 1:
        from maha_attn.report.table import metrics_table

        summary = work.summarise(todo, results)
        seeds = ", ".join(str(seed) for seed in summary["seeds"])
        print(f"\nMean and standard deviation over seeds {seeds}")
        print(f"\n{metrics_table(summary['metrics'])}\n\nResults: {todo.folder / 'summary.json'}")


def seeds(text: str) -> list[int]:
    """``1,2,3``."""
    return [int(seed) for seed in text.split(",")]


def train_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What `maha train` takes beside the settings of a recipe, and those settings."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    how = flags.add_mutually_exclusive_group()
    how.add_argument("--overwrite", action="store_true")
    how.add_argument("--resume", action="store_true")
    flags.add_argument("--variant", action="append", dest="variants")
    flags.add_argument("--seeds", type=seeds)
    flags.add_argument("--pretrained")
    return flags.parse_known_args(arguments)


def evaluate(arguments: list[str]) -> None:
    """``maha eval``."""
    prog = "maha eval"
    with user_errors(prog):
        from dataclasses import asdict

        from maha_attn.tasks import runs as work

        run, settings = parse_run(prog, EVAL_HELP, arguments, "evaluation")
        quiet_libraries()
        recipe = work.stored_recipe(run, asdict(settings))
        kind, model, _ = work.load_model(run)
        task = kind(recipe)
    show(run, work.judge(task, model, recipe, run))


def generate(arguments: list[str]) -> None:
    """``maha generate``."""
    prog = "maha generate"
    with user_errors(prog):
        from maha_attn.tasks import runs as work

        explained = {"prompt": "the text to continue or to translate"}
        run, settings = parse_run(prog, GENERATE_HELP, arguments, "generation", explained)
        quiet_libraries()
        task, model, tokenizer = work.load_model(run)
        text = task.generate(model, tokenizer, settings)
    print(text)


def bench(arguments: list[str]) -> None:
    """``maha bench``."""
    parser = argparse.ArgumentParser(
        prog="maha bench",
        usage="maha bench {ops,layer,decode,cost,qp} ...",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ("ops", "layer", "decode", "cost", "qp")
    parser.add_argument("what", choices=kinds, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments[:1])
    module = importlib.import_module(f"maha_attn.bench.{chosen.what}")
    module.main(arguments[1:])


def reproduce(arguments: list[str]) -> None:
    """``maha reproduce``."""
    prog = "maha reproduce"
    with user_errors(prog):
        from maha_attn.reproduce.command import parse
        from maha_attn.reproduce.command import reproduce as run_exhibits

        options = parse(arguments)
    outcome = run_exhibits(options)
    try:
        from maha_attn.report.command import summary, write_report
    except ModuleNotFoundError as error:
        print(f"No report: {error.name} is not installed; pip install 'maha-attn[report]'")
    else:
        names = [exhibit.name for exhibit in options.exhibits]
        print(summary(*write_report(options.selection.results), names))
    sys.exit(1 if outcome.failed else 0)


def write_report(arguments: list[str]) -> None:
    """``maha report``."""
    with user_errors("maha report", extra="report"):
        from maha_attn.report.command import parse, summary
        from maha_attn.report.command import write_report as write

        options = parse(arguments)
        found = write(options.results, options.budget, options.html, options.markdown)
    print(summary(*found))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train, "train a model by a recipe, then evaluate it"),
    "eval": (evaluate, "score a trained model on its held-out text"),
    "generate": (generate, "continue a text with a trained model"),
    "reproduce": (reproduce, "run what a table or figure of the paper needs"),
    "report": (write_report, "turn results into a page and tables"),
    "bench": (bench, "measure speed and memory against full attention"),
}


def parse_run(
    prog: str,
    description: str,
    arguments: list[str],
    section: str,
    positionals: dict[str, str] | None = None,
) -> tuple["RunFolder", Any]:
    """Read the arguments of a command that works on a run.

    Args:
        prog: The command's name.
        description: The top of its help.
        arguments: Its arguments.
        section: The section of the run's recipe where the defaults stand.
        positionals: Its fields that are given without a name, and what to say of them.

    Returns:
        The run and the section's settings.
    """
    from jsonargparse import ArgumentParser

    from maha_attn.tasks import TASKS
    from maha_attn.tasks.runs import section_settings
    from maha_attn.training.recipe import HelpFormatter
    from maha_attn.training.run_folder import open_run

    positionals = positionals or {}
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    run, stored = None, {}
    settings = TASKS["language_modeling"].sections()[section]
    if path is not None and not {"-h", "--help"} & set(arguments):
        run = open_run(path)
        settings, stored = section_settings(run.settings(), section)
    parser = ArgumentParser(
        prog=prog,
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


def show(run: "RunFolder", result: dict[str, Any]) -> None:
    """Print what an evaluation found, and draw what can be drawn."""
    from maha_attn.report.table import metrics_table, perplexity_table

    is_text = "perplexities" in result
    print(f"\n{perplexity_table(result) if is_text else metrics_table(result['metrics'])}\n")
    for sample in result.get("samples", []):
        print("\n".join(f"{name}: {text}" for name, text in sample.items()) + "\n")
    if "sample" in result:
        print(f"Generated:\n{result['sample']['text']}\n")
    print(f"Results: {run.evaluation}")
    if "scale_usage" not in result:
        return
    if not result["scale_usage"]:
        print("No picture of the scales: no layer has more than one.")
        return
    try:
        from maha_attn.report.scales import draw_scale_usage
    except ModuleNotFoundError:
        print("No picture of the scales: pip install 'maha-attn[plot]' for it.")
        return
    draw_scale_usage(result, run.picture)
    print(f"How much each scale was used: {run.picture}")


USER_ERRORS = (RunError, ValueError, TypeError, OSError, argparse.ArgumentError)


@contextmanager
def user_errors(
    prog: str, kinds: tuple[type[Exception], ...] = USER_ERRORS, extra: str = "train"
) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line and exit code 2.

    With all ``kinds`` it encloses the reading and checking of the input, not the work, so that a
    fault of our own keeps its traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed; pip install 'maha-attn[{extra}]'"
    except kinds as error:
        message = " ".join(str(error).split())
    else:
        return
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(2)


@cache
def quiet_libraries() -> None:
    """Leave the terminal to progress bars that take longer than two seconds; others only flicker.

    tqdm's own TQDM_DELAY would come too late: torch has imported tqdm before this file is read.
    """
    import transformers
    from tqdm import tqdm

    transformers.utils.logging.disable_progress_bar()
    tqdm.__init__ = partialmethod(tqdm.__init__, delay=2)  # pyright: ignore[reportAttributeAccessIssue]
