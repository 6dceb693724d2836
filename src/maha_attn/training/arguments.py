"""The arguments of training: the Trainer's, and ours."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments and one more.

    Args:
        shard: Divide parameters, gradients and optimizer state among the processes (FSDP2) instead
            of copying the model to each; docs/distributed.md.

    Raises:
        ValueError: ``shard`` is asked of one process, or one of the Trainer's own ways to divide a
            model is asked for.
    """

    shard: bool = field(default=False)

    def __post_init__(self) -> None:
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name):
                raise ValueError(
                    f"train.{name} is not supported: its checkpoints are pickled and cannot be "
                    "verified; use train.shard=true (FSDP2), see docs/distributed.md"
                )
        super().__post_init__()
        if self.shard and self.world_size == 1:
            raise ValueError(
                "train.shard divides a model among processes, and there is one; start several with "
                "`torchrun --nproc_per_node N --no-python maha train RECIPE`, or leave it out"
            )
