"""The command ``maha``: it parses, calls and prints.

What a command needs is imported when it is called, so that ``maha --help`` is quick. What the user
got wrong is told in one line, before any work is begun.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maha_attn.training.checkpoint import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from maha_attn.data.corpus import Rows
    from maha_attn.training.recipe import EvaluationSettings, GenerationSettings
    from maha_attn.training.run_folder import RunFolder

TRAIN_HELP = """\
Train a causal language model on text files, then evaluate it.

RECIPE is a YAML file with the complete settings of a run in five sections: model, data, train,
evaluation and generation. Each setting can be overridden by its name. The train section takes
every option of transformers' TrainingArguments; those that matter most are listed below.

  --overwrite     replace the run folder if there is one
  --resume        continue from the run folder's last checkpoint

examples:
  maha train recipes/demo.yaml
  maha train recipes/demo.yaml --train.max_steps=20 --train.output_dir=runs/short
  maha train recipes/demo.yaml --data.files='[my-book.txt]' --train.output_dir=runs/my-book
  maha train recipes/demo.yaml --print_config     show all settings and stop
"""
EVAL_HELP = """\
Score a trained model on its held-out text, beside unigram and bigram models of its training text.
Writes evaluation.json and scales.png into the run folder.

examples:
  maha eval runs/demo
  maha eval runs/demo --stride 256     score each token with at least half a window before it
"""
GENERATE_HELP = """\
Continue a text. What is not given is taken from the generation section of the run's recipe.

examples:
  maha generate runs/demo "It was a fine morning"
  maha generate runs/demo "It was" --max_new_tokens 300 --temperature 0.6 --seed 1
"""


BENCH_HELP = """\
Measure costs: both sides in turn in one process, medians and spreads, ceilings of the same run.
Prints a table and writes a result file with everything needed to repeat it.

  maha bench ops        attention and fusion from Q, K, V, against full and windowed attention
  maha bench layer      the whole layer, from tokens to tokens
  maha bench decode     one more token by the cache of a long past, against full attention
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
        from maha_attn.data.corpus import make_rows, make_tokenizer, read_texts
        from maha_attn.training.distributed import (
            is_main_process,
            leave_process_group,
            main_process_first,
        )
        from maha_attn.training.recipe import load_recipe, print_help, recipe_parser
        from maha_attn.training.run_folder import RunFolder, create_run, resume_run
        from maha_attn.training.train import train_model

        usage = "maha train RECIPE [--overwrite | --resume] [--SECTION.SETTING VALUE ...]"
        parser = recipe_parser(prog=prog, usage=usage, description=TRAIN_HELP)
        path, *rest = arguments or ["--help"]
        if path in ("-h", "--help"):
            print_help(parser)
            sys.exit()
        if path.startswith("-"):
            raise ValueError(f"expected the recipe first, got {path}; usage: {usage}")
        flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        how = flags.add_mutually_exclusive_group()
        how.add_argument("--overwrite", action="store_true")
        how.add_argument("--resume", action="store_true")
        chosen, overrides = flags.parse_known_args(rest)
        recipe = load_recipe(parser, path, overrides)
        texts = read_texts(recipe.data)
        tokenizer = make_tokenizer(recipe.data, texts, recipe.model.vocab_size)
        folder, is_main = recipe.train.output_dir or "", is_main_process()
        if not is_main:
            run = RunFolder(Path(folder))
        elif chosen.resume:
            run = resume_run(folder, recipe.settings)
        else:
            run = create_run(folder, recipe.settings, chosen.overwrite)
    quiet_libraries()
    rows = main_process_first(lambda: make_rows(texts, tokenizer, recipe.data.sequence_length))
    if is_main:
        print(
            f"Training on {sum(map(len, texts.train)):,} characters of {len(texts.train)} "
            f"document(s), {sum(map(len, texts.held_out)):,} held out; run folder {run.path}",
            flush=True,
        )
    with user_errors(prog, (RunError,)):
        model = train_model(recipe.model, recipe.train, rows, run, resume=chosen.resume)
    leave_process_group()
    if is_main:
        report(run, model, rows, recipe.evaluation, recipe.generation)


def evaluate(arguments: list[str]) -> None:
    """``maha eval``."""
    prog = "maha eval"
    with user_errors(prog):
        from maha_attn.data.corpus import DataSettings, make_rows, read_texts
        from maha_attn.training.recipe import EvaluationSettings, GenerationSettings

        run, settings = parse_run(prog, EVAL_HELP, arguments, "evaluation", EvaluationSettings)
        data = DataSettings(**run.settings()["data"])
        settings.check(data.sequence_length)
        texts = read_texts(data)
        model, tokenizer = load_model(run)
    quiet_libraries()
    rows = make_rows(texts, tokenizer, data.sequence_length)
    report(run, model, rows, settings, GenerationSettings(**run.settings()["generation"]))


def generate(arguments: list[str]) -> None:
    """``maha generate``."""
    prog = "maha generate"
    with user_errors(prog):
        from maha_attn.evaluation.generation import continue_text
        from maha_attn.training.recipe import GenerationSettings

        run, settings = parse_run(
            prog,
            GENERATE_HELP,
            arguments,
            "generation",
            GenerationSettings,
            {"prompt": "the text to continue"},
        )
        model, tokenizer = load_model(run)
    print(continue_text(model, tokenizer, settings))


def bench(arguments: list[str]) -> None:
    """``maha bench``."""
    parser = argparse.ArgumentParser(
        prog="maha bench",
        usage="maha bench {ops,layer,decode,qp} ...",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("ops", "layer", "decode", "qp"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments[:1])
    module = importlib.import_module(f"maha_attn.bench.{chosen.what}")
    module.main(arguments[1:])


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train, "train a model by a recipe, then evaluate it"),
    "eval": (evaluate, "score a trained model on its held-out text"),
    "generate": (generate, "continue a text with a trained model"),
    "bench": (bench, "measure speed and memory against full attention"),
}


def parse_run(
    prog: str,
    description: str,
    arguments: list[str],
    section: str,
    settings: type[Any],
    positionals: dict[str, str] | None = None,
) -> tuple["RunFolder", Any]:
    """Read the arguments of a command that works on a run.

    Args:
        prog: The command's name.
        description: The top of its help.
        arguments: Its arguments.
        section: The section of the run's recipe where the defaults stand.
        settings: The class of that section.
        positionals: Its fields that are given without a name, and what to say of them.

    Returns:
        The run and an object of ``settings``.
    """
    from jsonargparse import ArgumentParser

    from maha_attn.training.recipe import HelpFormatter
    from maha_attn.training.run_folder import open_run

    positionals = positionals or {}
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
    run = open_run(parser.parse_args(arguments).run)
    stored = run.settings()[section]
    parser.set_defaults({name: v for name, v in stored.items() if name not in positionals})
    parsed = parser.parse_args(arguments)
    return run, settings(**{field.name: parsed[field.name] for field in fields(settings)})


def load_model(run: "RunFolder") -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """The trained model, on the GPU where there is one, and its tokenizer."""
    import torch

    from maha_attn.data.tokenizer import load_tokenizer
    from maha_attn.models import MahaForCausalLM

    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MahaForCausalLM.from_pretrained(run.model, use_safetensors=True, device_map=device)
    return model, load_tokenizer(run.model)


def report(
    run: "RunFolder",
    model: "PreTrainedModel",
    rows: "Rows",
    settings: "EvaluationSettings",
    generation: "GenerationSettings",
) -> None:
    """Evaluate a model, keep the result in the run folder, and print it."""
    from maha_attn.evaluation.evaluate import evaluate as evaluate_model
    from maha_attn.report.table import perplexity_table

    result = evaluate_model(model, rows, settings, generation)
    run.evaluation.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"\n{perplexity_table(result)}\n\nGenerated:\n{result['sample']['text']}\n")
    print(f"Results: {run.evaluation}")
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
def user_errors(prog: str, kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line and exit code 2.

    With all ``kinds`` it encloses the reading and checking of the input, not the work, so that a
    fault of our own keeps its traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed; pip install 'maha-attn[train]'"
    except kinds as error:
        message = " ".join(str(error).split())
    else:
        return
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(2)


def quiet_libraries() -> None:
    """Leave the terminal to the Trainer's progress bar."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
