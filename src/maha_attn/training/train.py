"""Training a causal language model: transformers' Trainer with our model, rows and metrics file."""

import json
import time
from pathlib import Path
from typing import Any, cast

from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from maha_attn.data.corpus import Rows
from maha_attn.models import MahaConfig, MahaForCausalLM
from maha_attn.training.run_folder import RunFolder


def train_model(
    config: MahaConfig,
    arguments: TrainingArguments,
    rows: Rows,
    run: RunFolder,
    resume: bool = False,
) -> MahaForCausalLM:
    """Train a model and save it with its tokenizer in the run folder.

    Args:
        config: The model; the size of its vocabulary and its special tokens become the tokenizer's.
        arguments: The Trainer's. It takes a GPU where there is one.
        rows: The text.
        run: Where metrics, checkpoints and the model go.
        resume: Continue from the run's last complete checkpoint.
    """
    tokenizer = rows.tokenizer
    config.vocab_size = len(tokenizer)
    config.eos_token_id = cast(int, tokenizer.eos_token_id)
    config.pad_token_id = cast(int, tokenizer.pad_token_id)
    set_seed(arguments.seed)
    model = MahaForCausalLM(config)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[RunFiles(run)],
    )
    trainer.train(resume_from_checkpoint=str(run.last_checkpoint()) if resume else None)
    if trainer.is_world_process_zero():
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
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
