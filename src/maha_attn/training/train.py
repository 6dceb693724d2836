"""Training: transformers' Trainer with the model and the rows of any task, and a run folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from maha_attn.training.checkpoint import appearing, full_disk_explained
from maha_attn.training.distributed import is_main_process, shard, wait_for_all
from maha_attn.training.divergence import StopDiverged
from maha_attn.training.early_stopping import EarlyStopping
from maha_attn.training.identity import identify_data, identify_settings
from maha_attn.training.metrics import MetricsFile
from maha_attn.training.model import adapt, load_saved
from maha_attn.training.recipe import LoraSettings, TrainSettings
from maha_attn.training.run_folder import RunFolder
from maha_attn.training.trainer import RunTrainer


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a task gives the Trainer.

    Args:
        train: Rows to learn from.
        validation: Rows whose loss, and whatever ``compute_metrics`` makes of the model's output,
            are logged where ``train.eval_strategy`` asks for it.
        tokenizer: Saved with the model.
        collator: Makes a batch of rows.
        compute_metrics: Names and values, for ``train.metric_for_best_model``.
    """

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerFast
    collator: Callable[[list[Any]], Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None


def train_model(
    model: PreTrainedModel,
    arguments: TrainSettings,
    examples: Examples,
    run: RunFolder,
    lora: LoraSettings,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train a model and save it with its tokenizer in the run folder.

    Args:
        model: Where it starts.
        arguments: The Trainer's. It takes a GPU where there is one.
        examples: What it learns from.
        run: Where metrics, checkpoints and the model go.
        lora: Whether all of it is trained. If not, updates are merged into the weights at the end.
        resume: Continue from the run's last complete checkpoint, where there is one.
        callbacks: More of the Trainer's callbacks.

    Raises:
        RunError: The checkpoint is damaged or belongs to another run, the disk is full, or the loss
            is no number.
    """
    callbacks = [MetricsFile(run.metrics), StopDiverged(), *callbacks]
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(arguments.early_stopping_patience))
    if arguments.shard:
        shard(model, arguments.device)
    trainer = RunTrainer(
        belongs_to=identify_settings(run.settings())
        | identify_data(examples.train, examples.tokenizer, arguments),
        model=model if lora.rank is None else adapt(model, lora),
        args=arguments,
        train_dataset=examples.train,
        eval_dataset=examples.validation,
        data_collator=examples.collator,
        processing_class=examples.tokenizer,
        compute_metrics=examples.compute_metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has what it prints without tqdm.
    with full_disk_explained(run.path):
        trainer.train_on(run.last_checkpoint() if resume else None)
        if lora.rank is None:
            trainer.save_to(run.model)
        else:
            model = trainer.model.merge_and_unload()
            if is_main_process():
                with appearing(run.model) as folder:
                    model.save_pretrained(folder)
                    examples.tokenizer.save_pretrained(folder)
            wait_for_all()
    # What is divided cannot be evaluated in one process.
    return load_saved(type(model), run.model) if arguments.shard else model
