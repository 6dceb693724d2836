"""transformers' Trainer with checkpoints that survive being killed and hold no pickle.

The Trainer trains; this class replaces how it saves and loads. A resumed run equals one that was
never interrupted, bit for bit on one machine: weights, optimizer, schedule, order of the data,
random generators, and the losses that are logged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from maha_attn.training import checkpoint as disk
from maha_attn.training import distributed
from maha_attn.training.arguments import RunArguments
from maha_attn.training.collation import Collator, RepeatableCollator
from maha_attn.training.identity import check_same_run
from maha_attn.training.random_state import get_random_state, set_random_state
from maha_attn.training.state_file import load_state, save_state
from maha_attn.training.whole_state import (
    gather_optimizer_state,
    gather_weights,
    load_optimizer_state,
    load_weights,
)

_STATE = "training_state.safetensors"


class RunTrainer(Trainer):
    """A Trainer that keeps its checkpoints in ``args.output_dir``, the run folder.

    Args:
        belongs_to: What the checkpoints are of; stored in each.
        options: The Trainer's.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        belongs_to: dict[str, Any],
        args: RunArguments,
        data_collator: Collator,
        **options: Any,
    ) -> None:
        self.data_seed = args.seed if args.data_seed is None else args.data_seed
        self.repeatable = RepeatableCollator(data_collator, self.data_seed)
        self.row_order = torch.Generator()
        super().__init__(args=args, data_collator=self.repeatable, **options)
        self.belongs_to = belongs_to
        self.folder = Path(self.args.output_dir or "")
        self.sharded = distributed.is_sharded(self.model)
        self.saved_step: int | None = None
        # The Trainer would delete old checkpoints in place, where a kill leaves a part of one.
        self.kept_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        # Early stopping must count on where it was.
        self.args.restore_callback_states_from_checkpoint = True

    def train_on(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint of this run where one is given.

        Raises:
            RunError: The checkpoint is damaged, or belongs to another run.
        """

        def check() -> None:
            disk.clear_leftovers(self.folder)
            if checkpoint:
                check_same_run(checkpoint, disk.verify(checkpoint), self.belongs_to)

        distributed.main_process_alone(check)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def save_to(self, folder: Path) -> None:
        """Save model and tokenizer for ``from_pretrained``; every process calls it."""
        weights = self._gathered_weights()
        if self.args.should_save:
            with disk.appearing(folder) as hidden:
                self._write_model(hidden, weights)
        distributed.wait_for_all()

    def _gathered_weights(self) -> dict[str, Any] | None:
        """The weights of a sharded model, in the main process."""
        return gather_weights(self.model) if self.sharded else None

    def _write_model(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """The model, by its own ``save_pretrained``, and the tokenizer."""
        self.model.save_pretrained(folder, state_dict=weights)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``: all processes give their part, the main one writes."""
        if self.saved_step == self.state.global_step:
            return
        self.saved_step = self.state.global_step
        self.store_flos()
        weights = self._gathered_weights()
        state = {
            "optimizer": gather_optimizer_state(self.model, self._plain_optimizer()),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if (scaler := self._scaler()) else None,
            "processes": distributed.gather(self._process_state()),
        }
        target = self.folder / f"checkpoint-{self.state.global_step}"
        self._complete_trainer_state(target)
        if not self.args.should_save:
            return
        with disk.appearing(target) as folder:
            self._write_model(folder, weights)
            save_state(state, folder / _STATE)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            disk.write_manifest(folder, self.belongs_to)
        best = self.state.best_model_checkpoint
        disk.prune(self.folder, self.kept_checkpoints, Path(best) if best else None)

    def _complete_trainer_state(self, target: Path) -> None:
        """Note the best checkpoint and the callbacks' counters, as the Trainer does on saving.

        In every process: all of them load the best weights at the end.
        """
        best = target.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        holders = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [holder for holder in holders if isinstance(holder, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks

    def _process_state(self) -> dict[str, Any]:
        """What each process has of its own: random generators and losses not yet logged."""
        return {
            "random": get_random_state(),
            "loss": self._tr_loss,
            "loss_from_step": self._globalstep_last_logged,
        }

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore :meth:`_process_state`; another number of processes starts its own."""
        processes = load_state(Path(checkpoint or "") / _STATE, "processes")
        if len(processes) == self.args.world_size:
            state = processes[self.args.process_index]
            set_random_state(state["random"])
            self._tr_loss = state["loss"].to(self.args.device)
            # A mean over the steps since the last line, some of which were before the checkpoint.
            self._globalstep_last_logged = self._initial_global_step = state["loss_from_step"]

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the weights."""
        load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, which the main process may still be writing."""
        distributed.wait_for_all()
        load_weights(self.model, Path(self.state.best_model_checkpoint or ""))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's and the schedule's state."""
        if checkpoint is not None:
            file = Path(checkpoint) / _STATE
            optimizer = load_state(file, "optimizer")
            load_optimizer_state(self.model, self._plain_optimizer(), optimizer)
            self.lr_scheduler.load_state_dict(load_state(file, "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the state of fp16's gradient scaler."""
        if checkpoint is not None and (scaler := self._scaler()):
            scaler.load_state_dict(load_state(Path(checkpoint) / _STATE, "scaler"))

    def _scaler(self) -> Any:
        """fp16's gradient scaler, where there is one."""
        return getattr(self.accelerator, "scaler", None)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _init_training_state(self, *args: Any, **options: Any) -> tuple[int, int]:
        """Start from the checkpoint's state, but log, evaluate and save as is asked for now."""
        done = super()._init_training_state(*args, **options)
        self.state.compute_steps(self.args, self.state.max_steps)
        return done

    def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
        """Group rows by length in an order that an epoch begun anew repeats (others do so)."""
        sampler = super()._get_train_sampler(*args, **options)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self.row_order
        return sampler

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Train an epoch, unless all steps were done: the Trainer would add one to them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            self.repeatable.epoch = options["epoch"]
            self.row_order.manual_seed(self.data_seed + options["epoch"])
            super()._run_epoch(*args, **options)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        """Keep accelerate from copying (DDP) a model whose parameters are divided already."""
        if self.sharded and training:
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip; the norm is that of all processes' parts."""
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
