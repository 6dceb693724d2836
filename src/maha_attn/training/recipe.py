"""A recipe: the complete settings of a run in one YAML file, typed and overridable."""

from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from transformers import PreTrainedConfig

from maha_attn.data.corpus import DataSettings
from maha_attn.models import MahaConfig
from maha_attn.spec import AttentionSpec
from maha_attn.training.arguments import RunArguments

SECTIONS = ("model", "data", "train", "evaluation", "generation")
TRAIN_SHOWN = {
    *("output_dir", "seed", "use_cpu", "bf16", "torch_compile", "gradient_checkpointing"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "report_to", "shard"),
}
"""The Trainer's options that the help shows; all the others are accepted too."""
MODEL_HIDDEN = {
    *(option.name for option in fields(PreTrainedConfig)),
    *("causal", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
}
"""Options that the help does not show: set from the tokenizer, or of no use in training."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the held-out text is scored.

    Args:
        stride: Tokens by which the window moves on. Left out, windows do not overlap, and the
            first token of each is not scored; smaller strides give every token more context.
        batch_size: Windows at once.
        usage_rows: Windows over which the use of the scales is averaged.
    """

    stride: int | None = None
    batch_size: int = 8
    usage_rows: int = 16

    def check(self, sequence_length: int) -> None:
        """Refuse a stride that does not fit the windows."""
        if self.stride is not None and not 1 <= self.stride < sequence_length:
            raise ValueError(
                "evaluation.stride must be between 1 and data.sequence_length - 1 = "
                f"{sequence_length - 1}, got {self.stride}; leave it out for windows that do not "
                "overlap"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How text is continued.

    Args:
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        temperature: Of the sampling; 0 takes the likeliest token each time.
        top_p: Sample among the likeliest tokens of this much probability.
        seed: Of the sampling.
    """

    prompt: str = "It was"
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run.

    Args:
        model: The model; its vocabulary's size is also the size of a tokenizer to be trained.
        data: The text.
        train: The Trainer's own arguments; ``output_dir`` is the run folder.
        evaluation: How the model is scored.
        generation: How it continues text.
        settings: All of the above as plain values: what a run folder keeps.
    """

    model: MahaConfig
    data: DataSettings
    train: RunArguments
    evaluation: EvaluationSettings
    generation: GenerationSettings
    settings: dict[str, Any] = field(repr=False)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of descriptions as they are, and shows every option's type and default."""


def recipe_parser(**options: Any) -> ArgumentParser:
    """The parser of a recipe's options, which raises its errors.

    Args:
        options: Of the ArgumentParser: ``prog``, ``usage``, ``description``.
    """
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        **options,
    )
    parser.add_argument("--recipe", action="config", help=SUPPRESS)
    parser.add_class_arguments(MahaConfig, "model", fail_untyped=False)
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(RunArguments, "train")
    parser.add_class_arguments(EvaluationSettings, "evaluation")
    parser.add_class_arguments(GenerationSettings, "generation")
    parser.set_defaults(
        {
            "train.output_dir": None,
            "train.report_to": ["tensorboard"] if find_spec("tensorboard") else ["none"],
            "train.dataloader_pin_memory": torch.cuda.is_available(),
        }
    )
    return parser


def print_help(parser: ArgumentParser) -> None:
    """Print the help, less the options that few need; AttentionSpec's words explain its own."""
    documented = parse_docstring(AttentionSpec.__doc__ or "").params
    explained = {parameter.arg_name: parameter.description for parameter in documented}
    for action in parser._actions:
        section, _, name = action.dest.partition(".")
        name = name.removesuffix(".help")
        if section == "model" and (not name or name in MODEL_HIDDEN):
            action.help = SUPPRESS
        elif section == "model" and name in explained:
            action.help = str(explained[name]).replace("``", "")
        elif section == "train" and name not in TRAIN_SHOWN:
            action.help = SUPPRESS
    parser.print_help()


def load_recipe(parser: ArgumentParser, path: str, overrides: list[str]) -> Recipe:
    """Read a recipe and the options that override it.

    Args:
        parser: Of :func:`recipe_parser`.
        path: The recipe's path, in the current directory or among those of the package.
        overrides: Command-line arguments such as ``--train.max_steps=10``.

    Raises:
        ValueError: The file does not exist, is no YAML, or an option or its value is unknown.
    """
    file = find_recipe(path)
    try:
        _check_sections(yaml.safe_load(file.read_text(encoding="utf-8")))
        parsed = parser.parse_args(["--recipe", str(file), *overrides])
        parsed.train.output_dir = parsed.train.output_dir or str(Path("runs") / file.stem)
        objects = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(f"recipe {path}: {error}{_did_you_mean(str(error), parser)}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    objects.evaluation.check(objects.data.sequence_length)
    settings = yaml.safe_load(parser.dump(parsed, skip_unset=False))
    return Recipe(**{name: objects[name] for name in SECTIONS}, settings=settings)


def _check_sections(content: object) -> None:
    """Refuse a recipe without sections, or with one of an unknown name."""
    expected = f"expected YAML with the sections {', '.join(SECTIONS)}"
    if not isinstance(content, dict):
        raise ValueError(f"{expected}; got {type(content).__name__}")
    if unknown := [str(name) for name in content if name not in SECTIONS]:
        raise ValueError(f"{expected}; got {', '.join(unknown)}")


def find_recipe(path: str) -> Path:
    """The file that ``path`` names, here or among the recipes of the package."""
    package = Path(str(files("maha_attn")))
    for folder in (Path(), package, package.parents[1]):  # here, in a wheel, in a checkout
        if (folder / path).is_file():
            return folder / path
    raise ValueError(
        f"recipe {path!r} does not exist (looked in {Path.cwd()}); "
        "give the path of a YAML file, for example recipes/demo.yaml"
    )


def _did_you_mean(message: str, parser: ArgumentParser) -> str:
    """A hint at the option that a misspelt one in the message may mean."""
    known = {action.dest.rpartition(".")[2]: action.dest for action in parser._actions}
    for word in message.replace("=", " ").split():
        unknown = word.strip("'\":;,.").rpartition(".")[2].lstrip("-")
        if unknown not in known and (close := get_close_matches(unknown, known, 1, cutoff=0.75)):
            return f"; did you mean {known[close[0]]}?"
    return "; `maha train --help` lists the options"
