"""Training with several processes.

Started by torchrun or `accelerate launch`, the Trainer copies the model to every process (DDP).
With ``train.shard`` parameters, gradients and optimizer state are divided among the processes
instead (FSDP2, ``torch.distributed.fsdp.fully_shard``), on GPUs as on CPUs. accelerate's own FSDP
is not used: on CPUs it trains copies without a word, so that it could not be tested here, and its
checkpoints are pickled.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from maha_attn.training.checkpoint import RunError

T = TypeVar("T")


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def leave_process_group() -> None:
    """Say goodbye to the other processes, after all common work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def main_process_alone(work: Callable[[], object]) -> None:
    """Do ``work`` in the main process, while the others wait.

    Raises:
        RunError: In the others: it failed in the main process, which raises what it met.
    """
    failed = [is_main_process()]
    try:
        if is_main_process():
            work()
            failed = [False]
    finally:
        if dist.is_initialized():
            dist.broadcast_object_list(failed)
    if failed[0]:
        raise RunError("the main process failed; its message says why")


def main_process_first(work: Callable[[], T]) -> T:
    """Do ``work`` in the main process, then, with its files and caches in place, in the others.

    Raises:
        RunError: As :func:`main_process_alone`.
    """
    results: list[T] = []
    main_process_alone(lambda: results.append(work()))
    return results[0] if results else work()


def gather(value: T) -> list[T]:
    """The values of all processes in the main process; an empty list in the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.gather_object(value, values if is_main_process() else None)
    return values if is_main_process() else []


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Divide every parameter among the processes, in place; each block is gathered when it runs.

    Rows shorter than a block of the coarsest scale do not use its parameters. Processes whose rows
    differ in that would sum different gradients and fail, so there they get gradients of zero.
    """
    config = model.config
    coarsest = getattr(config, "ratio", 1) ** (getattr(config, "num_scales", 1) - 1)

    def use_all(block: nn.Module, inputs: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if hidden.shape[1] <= coarsest:
            hidden = hidden + 0 * sum(p.flatten()[0] for p in block.parameters() if p.requires_grad)
        return (hidden, *rest) if rest else hidden

    nn.Module.to(model, device)
    mesh = init_device_mesh(device.type, (num_processes(),))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.register_forward_hook(use_all)
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` divided the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
