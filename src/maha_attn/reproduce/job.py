"""A run to be done, and the clock that says when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from maha_attn.experiments.definition import Experiment
from maha_attn.experiments.results import result_path


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of an experiment with one seed at one budget.

    Attributes:
        folder: Where an interrupted run leaves what it needs to be continued.
        device: Where it runs.
        pretrained: The run whose model it starts from.
        keeps_model: Another run starts from its model, so a result without it is not enough.
        shares_device: Others run there meanwhile, so that its speed says nothing.
    """

    experiment: Experiment
    row: str
    seed: int
    budget: str
    folder: Path
    device: torch.device
    pretrained: Job | None = None
    keeps_model: bool = False
    shares_device: bool = False

    @property
    def name(self) -> str:
        """As progress shows it."""
        return f"{self.experiment.name}/{self.row}, seed {self.seed}"

    @property
    def explains(self) -> bool:
        """Its attention on a passage is kept."""
        first = self.experiment.budgets[self.budget].seeds[0]
        return self.row in self.experiment.explained and self.seed == first

    def result(self, results: Path) -> Path:
        """Where its result file is, in the folder of all."""
        return result_path(results, self.experiment.name, self.budget, self.row, self.seed)

    @property
    def model(self) -> Path:
        """Where the weights that it has learned are."""
        return self.folder / "model" / "model.safetensors"


@dataclass
class Clock:
    """Tells the progress of a run, and when the time is up.

    Attributes:
        deadline: On `time.monotonic`; None: there is none.
        show: Called with steps done, steps in all and a note.
    """

    deadline: float | None = None
    show: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)

    @property
    def is_up(self) -> bool:
        """The run should stop."""
        return self.deadline is not None and time.monotonic() >= self.deadline
