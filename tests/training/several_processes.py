"""What each process of test_distributed.py does; started by torchrun in a folder with small.yaml.

Trains with copies of the model (DDP), with a model divided among the processes, and goes on with
checkpoints of one process and of its own. Writes down in processes-<rank>.json what the parameters
were at every checkpoint.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from maha_attn import cli
from maha_attn.models import MahaConfig, MahaForCausalLM
from maha_attn.tasks import runs
from maha_attn.training import distributed
from maha_attn.training.trainer import RunTrainer

save_checkpoint = RunTrainer._save_checkpoint
seen: dict[str, list[dict[str, Any]]] = {}


def note_and_save(self: RunTrainer, *args: Any) -> None:
    """Note how the model, and its optimizer's state, are held by this process."""
    parameters = list(self.model.parameters())
    moments = [state["exp_avg"] for state in self.optimizer.state.values()]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    note = {
        "wrapper": type(self.model_wrapped).__name__,
        "parameters_are_dtensors": all(isinstance(p, DTensor) for p in parameters),
        "moments_are_dtensors": all(isinstance(m, DTensor) for m in moments),
        "part_held": sum(p.numel() for p in held) / sum(p.numel() for p in parameters),
    }
    seen.setdefault(self.folder.name, []).append(note)
    save_checkpoint(self, *args)


BEST = [
    *("--train.load_best_model_at_end=true", "--train.eval_strategy=steps", "--train.eval_steps=6"),
    *("--train.metric_for_best_model=eval_loss", "--train.greater_is_better=true"),
]
"""The best weights are not the last: the loss falls, and the greatest is asked for."""


def train(name: str, *options: str) -> None:
    """Train by small.yaml in the folder ``name``; a step learns from as many rows as with one."""
    rows = 4 // int(os.environ["WORLD_SIZE"])
    batch = f"--train.per_device_train_batch_size={rows}"
    cli.main(["train", "small.yaml", f"--train.output_dir={name}", batch, *options])


def copy_at_step_6(source: str, target: str) -> None:
    """The run as if it had been killed after its sixth step."""

    def copy() -> None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "checkpoint-12"))

    distributed.main_process_first(lambda: None if Path(target).exists() else copy())


def unequal_rows() -> None:
    """Only in one process are rows too short for the coarsest scale (8 tokens a position)."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = MahaForCausalLM(MahaConfig(vocab_size=9, num_hidden_layers=2, num_scales=4, **sizes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.shard(model, torch.device(device))
    length = 3 if distributed.is_main_process() else 20
    rows = torch.ones(2, length, dtype=torch.int64, device=device)
    model(rows, labels=rows).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


if __name__ == "__main__":
    RunTrainer._save_checkpoint = note_and_save
    leave_process_group = distributed.leave_process_group
    distributed.leave_process_group = lambda: None  # until all is done
    runs.judge = lambda *args: {}
    cli.show = lambda *args: None
    train("copied")
    train("divided", "--train.shard=true")
    copy_at_step_6("divided", "divided-again")
    train("divided-again", "--resume", "--train.shard=true")
    train("divided-best", "--train.shard=true", *BEST)
    copy_at_step_6("one", "one-to-several")
    train("one-to-several", "--resume", "--train.shard=true")
    unequal_rows()
    Path(f"processes-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    leave_process_group()
