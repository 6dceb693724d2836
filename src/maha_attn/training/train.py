"""Training: transformers' Trainer with the model and the rows of any task, and our metrics file."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from maha_attn.training.model import adapt
from maha_attn.training.recipe import LoraSettings, TrainSettings
from maha_attn.training.run_folder import RunFolder


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
) -> PreTrainedModel:
    """Train a model and save it with its tokenizer in the run folder.

    Args:
        model: Where it starts.
        arguments: The Trainer's. It takes a GPU where there is one.
        examples: What it learns from.
        run: Where metrics, checkpoints and the model go.
        lora: Whether all of it is trained. If not, updates are merged into the weights at the end.
        resume: Continue from the run's last complete checkpoint.
    """
    callbacks: list[TrainerCallback] = [RunFiles(run)]
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = Trainer(
        model=model if lora.rank is None else adapt(model, lora),
        args=arguments,
        train_dataset=examples.train,
        eval_dataset=examples.validation,
        data_collator=examples.collator,
        processing_class=examples.tokenizer,
        compute_metrics=examples.compute_metrics,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=str(run.last_checkpoint()) if resume else None)
    if lora.rank is not None:
        model = trainer.model.merge_and_unload()  # pyright: ignore
    if trainer.is_world_process_zero():
        model.save_pretrained(run.model)
        examples.tokenizer.save_pretrained(run.model)
    return model


class RunFiles(TrainerCallback):
    """Appends what the Trainer logs to metrics.jsonl, and keeps pickles out of checkpoints."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an interrupted run logged after the checkpoint that training resumes from."""
        self.started = time.perf_counter()
        if state.is_world_process_zero and self.run.metrics.exists():
            lines = self.run.metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            self.run.metrics.write_text("".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            elapsed_s = round(time.perf_counter() - self.started, 3)
            line = {"step": state.global_step, "elapsed_s": elapsed_s, **(logs or {})}
            with self.run.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the pickled arguments: recipe.yaml has them, and nothing reads the pickle."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)
