"""The command ``maha``: it parses, calls and prints.

What a command needs is imported when it is called, so that ``maha --help`` is quick. What the user
got wrong is told in one line, before any work is begun.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partialmethod
from importlib.metadata import PackageNotFoundError, version

from maha_attn.report.show import show, show_seeds
from maha_attn.training.checkpoint import RunError

BENCH_HELP = """\
Measure costs: both sides in turn in one process, medians and spreads, ceilings of the same run.
Prints a table and writes a result file with everything needed to repeat it.

  maha bench ops        attention and fusion from Q, K, V, against full and windowed attention
  maha bench layer      the whole layer, from tokens to tokens
  maha bench decode     one more token by the cache of a long past, against full attention
  maha bench cost       every attention and length: FLOPs, time, throughput, memory
  maha bench first_call what compiling takes, in a process that finds nothing compiled
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
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(arguments)


def versions() -> str:
    """``maha-attn 0.1.0 (torch 2.13.0, triton 3.7.1)``, of the two what is installed."""
    found = []
    for name in ("torch", "triton"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"maha-attn {version('maha-attn')} ({', '.join(found)})"


def train(arguments: list[str]) -> None:
    """``maha train``."""
    prog = "maha train"
    with user_errors(prog):
        from maha_attn.tasks import runs as work
        from maha_attn.tasks.command import parse_train
        from maha_attn.training.distributed import (
            is_main_process,
            leave_process_group,
            num_processes,
        )

        path, flags, overrides = parse_train(arguments)
        quiet_libraries()
        todo = work.plan(path, overrides, flags)
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
            show(results[-1], run.evaluation, run.picture)
    if len(results) > 1:
        show_seeds(work.summarise(todo, results), todo.folder / "summary.json")


def evaluate(arguments: list[str]) -> None:
    """``maha eval``."""
    with user_errors("maha eval"):
        from maha_attn.tasks import runs as work
        from maha_attn.tasks.command import parse_eval

        run, settings = parse_eval(arguments)
        quiet_libraries()
        recipe = work.stored_recipe(run, asdict(settings))
        kind, model, _ = work.load_model(run)
        task = kind(recipe)
        task.require_model(model)
    show(work.judge(task, model, recipe, run), run.evaluation, run.picture)


def generate(arguments: list[str]) -> None:
    """``maha generate``."""
    with user_errors("maha generate"):
        from maha_attn.tasks.command import parse_generate
        from maha_attn.tasks.runs import load_model

        run, settings = parse_generate(arguments)
        quiet_libraries()
        task, model, tokenizer = load_model(run)
        text = task.generate(model, tokenizer, settings)
    print(text)


def bench(arguments: list[str]) -> None:
    """``maha bench``."""
    parser = argparse.ArgumentParser(
        prog="maha bench",
        usage="maha bench {ops,layer,decode,cost,first_call,qp} ...",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ("ops", "layer", "decode", "cost", "first_call", "qp")
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


USER_ERRORS = (RunError, ValueError, TypeError, OSError, argparse.ArgumentError)


@contextmanager
def user_errors(
    prog: str, kinds: tuple[type[Exception], ...] = USER_ERRORS, extra: str = "train"
) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line and exit code 2.

    With all ``kinds`` it encloses the reading and checking of the input, not the work, so that a
    fault of our own keeps its traceback. Of several processes that torchrun started the first on
    each machine prints the line; it may come before they know of each other.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed; pip install 'maha-attn[{extra}]'"
    except kinds as error:
        message = " ".join(str(error).split())
    else:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
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
