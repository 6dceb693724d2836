"""State of a model and its optimizer as a whole, however many processes share it.

Gathered in the main process by torch.distributed.checkpoint's ``state_dict`` functions, under the
parameters' names: a checkpoint of two processes continues in one or in eight. That package's own
files are not used: its reader unpickles what their metadata holds.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from maha_attn.training.checkpoint import RunError

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """The weights in the main process, and nothing in the others; every process calls it."""
    return get_model_state_dict(model, options=_WHOLE)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what ``save_pretrained`` of the model, or of its adapters (peft), wrote as safetensors.

    Raises:
        RunError: The tensors' names or shapes are not the model's.
    """
    try:
        if hasattr(model, "peft_config"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
            return
        weights: dict[str, Any] = {}
        for part in sorted(folder.glob("model*.safetensors")):
            weights |= load_file(part)
        for name, same_as in getattr(model, "all_tied_weights_keys", {}).items():
            weights.setdefault(name, weights[same_as])
        set_model_state_dict(model, weights, options=_WHOLE)
    except (KeyError, RuntimeError) as error:
        raise RunError(f"the weights in {folder} are not those of this model: {error}") from error


def gather_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state in the main process, and none in the others; every process calls it."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Give this process its part of the state."""
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
