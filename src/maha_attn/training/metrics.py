"""metrics.jsonl: what training logged, each step once, however often the run was interrupted."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maha_attn.training.checkpoint import replace_text


class MetricsFile(TrainerCallback):
    """Appends what the Trainer logs, one JSON object a line; ``elapsed_s`` counts training only."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an interrupted run logged after the checkpoint that training resumes from."""
        kept = []
        if state.is_world_process_zero and self.file.exists():
            lines = filter(None, map(_parse, self.file.read_text(encoding="utf-8").splitlines()))
            kept = [
                line
                for line in lines
                if line["step"] <= state.global_step and "train_runtime" not in line  # its summary
            ]
            replace_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        before_s = kept[-1]["elapsed_s"] if kept else 0.0
        self.started = time.perf_counter() - before_s

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
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _parse(line: str) -> dict[str, Any] | None:
    """The line's object; None for a line that was cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None
