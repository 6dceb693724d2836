"""Stopping a run whose loss is no number any more."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maha_attn.training.checkpoint import RunError


class DivergedError(RunError):
    """The loss is no number any more, and what to try.

    Attributes:
        step: The last one.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class StopDiverged(TrainerCallback):
    """Ends a run when a logged loss is not finite: no later step would mend it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the loss, or at the end at the mean of all steps.

        Raises:
            DivergedError: It is infinite or no number.
        """
        logs = logs or {}
        loss = logs.get("loss", logs.get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss is {loss} after step {state.global_step}; begin "
                f"again with a lower train.learning_rate (now {args.learning_rate:g}), more "
                "train.warmup_steps or a lower train.max_grad_norm, or in another precision",
                state.global_step,
            )
