"""Stopping early, and saying so."""

from typing import Any

from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which prints a line when it stops a run."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Count the evaluations without a better value."""
        ended = control.should_training_stop  # all steps are done
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not ended and state.is_world_process_zero:
            tqdm.write(  # above the bar
                f"Stopped early at step {state.global_step}: {args.metric_for_best_model} was best "
                f"at step {state.best_global_step} ({state.best_metric:.4g})"
            )
