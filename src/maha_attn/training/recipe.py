"""A recipe: the complete settings of a run in one YAML file, typed and overridable.

Beside its sections a recipe has ``task``, what is learned; ``pretrained``, the run to start from;
``seeds``, to repeat the run with; and ``variants``, named changes of all these.
"""

from argparse import SUPPRESS, RawDescriptionHelpFormatter
from copy import deepcopy
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from transformers import PreTrainedConfig, SchedulerType, get_scheduler

from maha_attn.models import MahaConfig
from maha_attn.spec import AttentionSpec
from maha_attn.training.arguments import RunArguments

SECTIONS = ("model", "data", "train", "lora", "evaluation", "generation")
KEYS = ("task", "pretrained", "seeds", "variants")
TRAIN_SHOWN = {
    *("output_dir", "seed", "use_cpu", "bf16", "torch_compile", "gradient_checkpointing"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "report_to", "shard"),
    *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
    "train_sampling_strategy",
}
"""The Trainer's options that the help shows; all the others are accepted too."""
MODEL_HIDDEN = {
    *(option.name for option in fields(PreTrainedConfig)),
    *("causal", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    "decoder_start_token_id",
}
"""Options that the help does not show: set from the task and the tokenizer."""


@dataclass
class TrainSettings(RunArguments):
    """The Trainer's arguments, whether to divide the model, and when to stop early.

    Args:
        early_stopping_patience: Stop after so many evaluations without a better
            metric_for_best_model; needs load_best_model_at_end.
    """

    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        try:
            get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
                num_warmup_steps=0,
                num_training_steps=1,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs,  # pyright: ignore
            )
        except (TypeError, ValueError) as error:
            kind = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(
                f"train.lr_scheduler_type {kind} cannot be made with train.lr_scheduler_kwargs "
                f"{self.lr_scheduler_kwargs}: {error}"
            ) from error
        if self.learning_rate < 0:
            raise ValueError(f"train.learning_rate must be at least 0, got {self.learning_rate}")
        patience, best = self.early_stopping_patience, self.load_best_model_at_end
        if patience is not None and not (patience >= 1 and best):
            raise ValueError(
                "train.early_stopping_patience must be at least 1 and needs "
                "train.load_best_model_at_end: true, with eval_strategy and save_strategy the same "
                f"(steps or epoch); got {patience} with load_best_model_at_end: {str(best).lower()}"
            )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adaptation of a pretrained model, by peft.

    Args:
        rank: Of the updates; left out, all weights are trained.
        alpha: Updates are scaled by alpha/rank.
        dropout: In front of the updates.
        targets: Ends of the names of the adapted modules; by default every linear projection
            inside the blocks.
    """

    rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        """Check what types do not say."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run.

    Args:
        model: The model; its vocabulary's size is also the size of a tokenizer to be trained.
        data: What it learns from, as its task reads it.
        train: The Trainer's own arguments; ``output_dir`` is the run folder.
        lora: What of it is trained.
        evaluation: How the model is scored, as its task does it.
        generation: How it continues text.
        pretrained: Folder of the run or of the saved model that it starts from.
        settings: All of the above as plain values: what a run folder keeps.
    """

    model: MahaConfig
    data: Any
    train: TrainSettings
    lora: LoraSettings
    evaluation: Any
    generation: Any
    pretrained: str | None = None
    settings: dict[str, Any] = field(repr=False)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of descriptions as they are, and shows every option's type and default."""


def recipe_parser(sections: dict[str, type], **options: Any) -> ArgumentParser:
    """The parser of a recipe's options, which raises its errors.

    Args:
        sections: The classes of the sections model, data, evaluation and generation.
        options: Of the ArgumentParser: ``prog``, ``usage``, ``description``.
    """
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        **options,
    )
    classes = {"train": TrainSettings, "lora": LoraSettings, **sections}
    for section in SECTIONS:
        parser.add_class_arguments(classes[section], section, fail_untyped=section != "model")
    parser.set_defaults(
        {
            "train.output_dir": None,
            "train.report_to": ["tensorboard"] if find_spec("tensorboard") else ["none"],
            "train.dataloader_pin_memory": torch.cuda.is_available(),
        }
    )
    return parser


def print_help(parser: ArgumentParser) -> None:
    """Print the help, less the options that few need; AttentionSpec explains and types its own."""
    documented = parse_docstring(AttentionSpec.__doc__ or "").params
    explained = {parameter.arg_name: parameter.description for parameter in documented}
    types = get_type_hints(AttentionSpec)
    for action in parser._actions:
        section, _, name = action.dest.partition(".")
        name = name.removesuffix(".help")
        if section == "model" and (not name or name in MODEL_HIDDEN):
            action.help = SUPPRESS
        elif section == "model" and name in explained:
            action.help = str(explained[name]).replace("``", "")
            action._typehint = types[name]  # pyright: ignore[reportAttributeAccessIssue]
        elif section == "train" and name not in TRAIN_SHOWN:
            action.help = SUPPRESS
    parser.print_help()


def read_recipe(path: str, variants: list[str] | None = None) -> dict[str, Any]:
    """Read a recipe's file, and change it as its variants say.

    Args:
        path: In the current directory or among the recipes of the package.
        variants: Names of variants of the recipe, applied one after the other.

    Returns:
        The recipe as plain values, less its variants.

    Raises:
        ValueError: The file does not exist, is no YAML, has an unknown section or no such variant.
    """
    try:
        recipe = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
        _check_sections(recipe)
        known = recipe.pop("variants", None) or {}
        for name in variants or []:
            if name not in known:
                raise ValueError(f"no variant {name!r}; there are {', '.join(known) or 'none'}")
            _check_sections(known[name])
            recipe = _changed(recipe, known[name])
        recipe.setdefault("task", "language_modeling")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    return recipe


def _changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with the values that ``changes`` names replaced, section by section."""
    result = deepcopy(settings)
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _changed(result[name], value) if inner else value
    return result


def parse_recipe(
    parser: ArgumentParser, recipe: dict[str, Any], path: str, overrides: list[str]
) -> Recipe:
    """Check a recipe's settings and those that override them.

    Args:
        parser: Of :func:`recipe_parser`.
        recipe: Of :func:`read_recipe`.
        path: Its path, for messages and the default run folder.
        overrides: Command-line arguments such as ``--train.max_steps=10``.

    Raises:
        ValueError: An option or its value is unknown.
    """
    sections = {name: recipe[name] for name in SECTIONS if name in recipe}
    where = f"recipe {path}"
    try:
        parsed = parser.parse_object(sections)
        if overrides:
            where = f"{where} and the options beside it"
            parsed = parser.parse_args(overrides, namespace=parsed)
        parsed.train.output_dir = parsed.train.output_dir or str(Path("runs") / Path(path).stem)
        objects = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(f"{where}: {error}{_did_you_mean(str(error), parser)}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    keys = {name: recipe.get(name) for name in ("task", "pretrained")}
    settings = keys | yaml.safe_load(parser.dump(parsed, skip_unset=False))
    return Recipe(
        **{name: objects[name] for name in SECTIONS},
        pretrained=recipe.get("pretrained"),
        settings=settings,
    )


def _check_sections(content: object) -> None:
    """Refuse a recipe without sections, or with one of an unknown name."""
    expected = f"expected YAML with the sections {', '.join(SECTIONS)} and {', '.join(KEYS)}"
    if not isinstance(content, dict):
        raise ValueError(f"{expected}; got {type(content).__name__}")
    if unknown := [str(name) for name in content if name not in (*SECTIONS, *KEYS)]:
        raise ValueError(f"{expected}; got {', '.join(unknown)}")


def find_recipe(path: str) -> Path:
    """The file that ``path`` names, here or among the recipes of the package."""
    package = Path(str(files("maha_attn")))
    for folder in (Path(), package, package.parents[1]):  # here, in a wheel, in a checkout
        if (folder / path).is_file():
            return folder / path
    raise ValueError(
        f"it does not exist (looked in {Path.cwd()}); "
        "give the path of a YAML file, for example recipes/demo.yaml"
    )


def _did_you_mean(message: str, parser: ArgumentParser) -> str:
    """A hint at the option that a misspelt one in the message may mean."""
    known = {action.dest.rpartition(".")[2]: action.dest for action in parser._actions}
    for word in message.replace("=", " ").split():
        if not word.startswith(("--", "'", '"')):
            continue
        unknown = word.strip("'\":;,.").rpartition(".")[2].lstrip("-")
        if unknown not in known and (close := get_close_matches(unknown, known, 1, cutoff=0.75)):
            return f"; did you mean {known[close[0]]}?"
    return "; `maha train --help` lists the options"
