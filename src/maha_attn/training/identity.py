"""What makes two runs the same run, so that one may go on where the other stopped."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from maha_attn.training.arguments import RunArguments
from maha_attn.training.checkpoint import RunError
from maha_attn.training.distributed import num_processes

_NOT_TRAINING = ("evaluation", "generation", "seeds", "variants")
_MAY_CHANGE = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_", "gradient_accumulation_steps"),
    *("logging_", "log_", "eval_", "save_", "report_to", "run_name", "disable_tqdm", "project"),
    *("dataloader_num_workers", "dataloader_p", "gradient_checkpointing", "activation_check"),
    *("use_cpu", "torch_compile", "shard", "ddp_", "hub_", "push_to_hub", "trackio"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
"""Beginnings of the Trainer's options that leave what is learned from each step as it was. Batches
may be cut differently as long as a step learns from as many rows."""
_OF_TEXT = ("tokenizer", "number of training rows", "content of training rows")
_SAMPLED_ROWS = 64


def identify_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, by dotted names, that a resumed run must share."""
    shared = {}
    for section, options in settings.items():
        if section in _NOT_TRAINING:
            continue
        if not isinstance(options, dict):
            shared[section] = options
            continue
        for name, value in options.items():
            if not (section == "train" and name.startswith(_MAY_CHANGE)):
                shared[f"{section}.{name}"] = value
    return shared


def identify_data(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: RunArguments
) -> dict[str, Any]:
    """The tokenizer, the training rows (their number, and some of them) and those of a step."""
    step = max(1, len(rows) // _SAMPLED_ROWS)
    sample = [rows[i] for i in range(0, len(rows), step)]
    per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return {
        "tokenizer": _digest([tokenizer.get_vocab(), tokenizer.special_tokens_map]),
        "number of training rows": len(rows),
        "content of training rows": _digest(sample),
        "number of rows a step": per_process * num_processes(),
    }


def check_same_run(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a checkpoint belongs to with the run that is to continue it.

    Raises:
        RunError: They differ; names the first difference.
    """
    for name, value in now.items():
        if name.startswith("train.") and name not in before:  # an option of a newer library
            continue
        if before.get(name) != value:
            changed = "the training text has changed: " if name in _OF_TEXT else ""
            raise RunError(
                f"cannot resume from {checkpoint}: {changed}{name} was {before.get(name)!r} there "
                f"and is {value!r} now; keep it, or start anew with --overwrite"
            )


def _digest(value: Any) -> str:
    """The beginning of the SHA-256 of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
