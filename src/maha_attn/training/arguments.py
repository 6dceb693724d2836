"""The arguments of training: the Trainer's, and ours."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments and one more. A process trains on one GPU.

    A loss that is no number is logged as such (``logging_nan_inf_filter`` is off): the filter would
    hide that a run diverged, and wait for the device at every step to do so.

    Args:
        shard: Divide parameters, gradients and optimizer state among the processes (FSDP2) instead
            of copying the model to each; docs/distributed.md.

    Raises:
        ValueError: ``shard`` is asked of one process, or one of the Trainer's own ways to divide a
            model is asked for, here or of `accelerate launch`, or that was asked for another
            precision.
    """

    shard: bool = field(default=False)
    logging_nan_inf_filter: bool = field(default=False)

    def __post_init__(self) -> None:
        for name in ("fsdp", "deepspeed"):
            asked = f"train.{name}" if getattr(self, name) else None
            if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false") == "true":
                asked = f"accelerate launch --use_{name}"
            if asked:
                raise ValueError(
                    f"{asked} is not supported: its checkpoints are pickled and cannot be "
                    "verified; use train.shard=true (FSDP2), see docs/distributed.md"
                )
        super().__post_init__()
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        if launched not in ("no", asked):
            raise ValueError(
                f"accelerate launch --mixed_precision {launched} is not what the recipe says: "
                f"leave it out, and set train.{launched}=true where it is meant"
            )
        if self.shard and self.world_size == 1:
            raise ValueError(
                "train.shard divides a model among processes, and there is one; start several with "
                "`torchrun --nproc_per_node N --no-python maha train RECIPE`, or leave it out"
            )

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one.

        The Trainer would copy the model to every GPU it sees (``nn.DataParallel``), and multiply
        the batch by their number.
        """
        return min(super().n_gpu, 1)
