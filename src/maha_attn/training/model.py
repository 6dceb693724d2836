"""The model that is trained: new, or with the weights of a run before it, or adapted by LoRA."""

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from maha_attn.baselines import ATTENTIONS
from maha_attn.models import MahaConfig, MahaSeq2SeqConfig
from maha_attn.training.recipe import LoraSettings
from maha_attn.training.run_folder import refuse_pickle

_FREE = {
    *(option.name for option in fields(PreTrainedConfig)),
    *(
        "backend",
        "classifier_pooling",
        "max_position_embeddings",
        "use_cache",
        "loss_chunk",
        "causal",
    ),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
}
"""Options in which a model may differ from the one that its weights come from."""


def saved_model(folder: str, model_class: type[PreTrainedModel]) -> Path:
    """The folder of the saved model that ``folder``, a run or such a folder itself, means.

    Args:
        folder: As the user gave it.
        model_class: What is to start from the saved model's weights.

    Raises:
        ValueError: There is none, it is of another kind, or its weights are no safetensors.
    """
    for path in (Path(folder) / "model", Path(folder)):
        if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
            saved, _ = PreTrainedConfig.get_config_dict(path)
            kind, needed = saved.get("model_type"), model_class.config_class.model_type  # pyright: ignore[reportOptionalMemberAccess]
            if kind != needed:
                raise ValueError(
                    f"pretrained {folder!r} holds a model of type {kind!r}, whose weights have no "
                    f"place in a {model_class.__name__} ({needed!r}); give the folder of a run "
                    "whose task has models of that type"
                )
            try:
                with safe_open(path / "model.safetensors", framework="pt"):
                    return path
            except SafetensorError as error:
                raise _damaged(path, error) from error
        refuse_pickle(path)
    raise ValueError(
        f"pretrained {folder!r} holds no model (config.json and model.safetensors, in it or in "
        "model/ of it); give the folder of a finished run"
    )


def with_pretrained(options: dict[str, Any], path: Path) -> dict[str, Any]:
    """The model section of a recipe that starts from a saved model.

    The saved model decides; of ``options`` those count that change no weight's place or meaning.
    """
    shared = _shared_options(AutoConfig.from_pretrained(path))
    return {k: v for k, v in options.items() if k in _FREE} | shared


def _shared_options(config: PreTrainedConfig) -> dict[str, Any]:
    """The options of a saved model that another one must share to take over its weights."""
    known = {option.name for option in fields(config)} - _FREE
    if any(not ATTENTIONS[name].any_length for name in config.layer_types or ()):
        known.add("max_position_embeddings")  # Weights have a line for each position.
    return {name: getattr(config, name) for name in sorted(known)}


def require_able(
    model_class: type[PreTrainedModel], config: MahaConfig, longest: int, pads: bool
) -> None:
    """Check that a model of these options can do its task, before there is one.

    Args:
        model_class: The model's.
        config: Its options, the task's own set.
        longest: Tokens that a row may have.
        pads: Whether rows of one batch differ in length.

    Raises:
        ModuleNotFoundError: An attention's library is not installed.
        ValueError: An attention lacks the direction, takes no rows so long, or no padding.
    """
    with torch.device("meta"):
        model_class(config)
    for name in dict.fromkeys(map(config.layer_type, range(config.num_hidden_layers))):
        attention = ATTENTIONS[name]
        if not attention.any_length and config.max_position_embeddings < longest:
            raise ValueError(
                f"model.layer_types: {name} is made for rows of one length; set "
                f"model.max_position_embeddings (now {config.max_position_embeddings}) to the "
                f"{longest} tokens that a row may have"
            )
        if pads and attention.padding == "counted":
            able = ", ".join(n for n, a in ATTENTIONS.items() if a.padding != "counted")
            raise ValueError(
                f"model.layer_types: {name} would take padding for text, and rows of this task "
                f"differ in length; choose among {able}"
            )


def require_fitting(
    model_class: type[PreTrainedModel], config: MahaConfig, causal: bool | None, path: Path
) -> None:
    """Refuse a saved model that another one cannot start from, before anything is done with it.

    Args:
        model_class: What is to start from it.
        config: The options of that.
        causal: Whether a token sees earlier ones alone; None: the model knows.
        path: The folder of the saved model.

    Raises:
        ValueError: An option differs; or the saved model never saw a later token, and now all
            tokens see all; or weights of the backbone are lacking, as in :func:`build_model`.
    """
    saved = AutoConfig.from_pretrained(path)
    for name, value in _shared_options(saved).items():
        if getattr(config, name) != value:
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r} in the recipe and {value!r} in the "
                f"pretrained model {path}; leave it out"
            )
    if causal is False and getattr(saved, "causal", False):
        raise ValueError(
            f"the pretrained model {path} is causal, and in this task every token sees all; start "
            "from a masked language model (maha train recipes/mlm.yaml)"
        )
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # What it reports of heads is no defect.
    logging.disable_progress_bar()
    try:
        _load(model_class, path, config)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_adaptable(
    model_class: type[PreTrainedModel], config: MahaConfig, lora: LoraSettings, path: Path | None
) -> None:
    """Refuse adapters of a new model, or of modules that a model does not have.

    Raises:
        ValueError: There is nothing to adapt.
    """
    if path is None:
        raise ValueError("lora.rank adapts a pretrained model: give --pretrained, or leave it out")
    with torch.device("meta"):
        adapt(model_class(config), lora)


def set_vocabulary(
    config: MahaConfig, tokenizer: PreTrainedTokenizerFast, pretrained: Path | None
) -> None:
    """Take the size of the vocabulary and the special tokens from the tokenizer.

    Args:
        config: Of the model; one that starts from a pretrained model has that one's vocabulary.
        tokenizer: What the model is to read.
        pretrained: The folder of the saved model.

    Raises:
        ValueError: The pretrained model has another vocabulary.
    """
    if pretrained is not None:
        require_vocabulary(tokenizer, config, pretrained)
    else:
        config.vocab_size = len(tokenizer)
    config.eos_token_id = cast(int, tokenizer.eos_token_id)
    config.pad_token_id = cast(int, tokenizer.pad_token_id)
    if isinstance(config, MahaSeq2SeqConfig):
        config.decoder_start_token_id = cast(int, tokenizer.cls_token_id)


def require_vocabulary(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, path: Path
) -> None:
    """Refuse a tokenizer whose tokens are not those of a saved model.

    Raises:
        ValueError: The number of tokens or the tokens themselves differ.
    """
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model in {path} has "
            f"vocab_size {config.vocab_size}; they do not belong together"
        )
    own = path / "tokenizer.json"
    if own.is_file() and Tokenizer.from_file(str(own)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer has other tokens than the model in {path} was trained with; leave "
            "data.tokenizer out to take the model's own"
        )


def build_model(
    model_class: type[PreTrainedModel], config: MahaConfig, pretrained: Path | None
) -> PreTrainedModel:
    """A new model, with every weight of the saved one that has a place in it.

    A head of another task, or for other classes, begins anew.

    Raises:
        ValueError: Weights of the backbone are missing or of another shape, or the file is damaged.
    """
    return model_class(config) if pretrained is None else _load(model_class, pretrained, config)[0]


def load_saved(
    model_class: type[PreTrainedModel], path: Path, device: str = "cpu"
) -> PreTrainedModel:
    """The model that a folder holds.

    Of the folder config.json and model.safetensors count alone: adapters, code and pickles that
    ``from_pretrained`` of the folder would look for or ask about are not.

    Raises:
        ValueError: The weights cannot be read, or are not those of such a model.
    """
    config = cast(Any, model_class.config_class).from_pretrained(path)
    model, found = _load(model_class, path, config, device)
    for kind in ("missing", "unexpected"):
        if names := sorted(found[f"{kind}_keys"]):
            raise ValueError(
                f"the weights in {path / 'model.safetensors'} are not those of a "
                f"{model_class.__name__}: {names[0]} is {kind} (of {len(names)} such)"
            )
    for name, saved, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{name} in {path / 'model.safetensors'} has the shape {tuple(saved)}, and "
            f"{tuple(expected)} by config.json; they do not belong together"
        )
    return model


def _load(
    model_class: type[PreTrainedModel], path: Path, config: MahaConfig, device: str = "cpu"
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with a folder's weights, those of the backbone at least, and what else differs."""
    try:
        weights = load_file(path / "model.safetensors", device=device)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    model, found = cast(Any, model_class).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        device_map=device,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = str(path)  # peft looks there
    other_shape = {name for name, *_ in found["mismatched_keys"]}
    backbone = f"{model_class.base_model_prefix}."
    lacking = sorted(n for n in {*found["missing_keys"], *other_shape} if n.startswith(backbone))
    if lacking:
        raise ValueError(
            f"{path / 'model.safetensors'} lacks, or has in another shape, {len(lacking)} of the "
            f"weights that its config.json describes, {lacking[0]} first; give a folder that "
            "save_pretrained made"
        )
    return model, found


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(
        f"{path / 'model.safetensors'} is damaged or no safetensors file ({error}); train the "
        "model again, or copy the file again from where it came"
    )


def adapt(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """Wrap a model so that low-rank updates of its projections, and its head, are trained alone."""
    from peft import LoraConfig, get_peft_model

    head = [
        name
        for name, module in model.named_children()
        if module is not model.base_model and module is not model.get_output_embeddings()
    ]
    config = LoraConfig(
        r=settings.rank or 0,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        exclude_modules=head,
        modules_to_save=head,
    )
    return get_peft_model(model, config)
