"""The state of the global random generators, as plain values and tensors."""

import random
from typing import Any, cast

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and the current GPU's generator."""
    name, words, *rest = cast(tuple, np.random.get_state())  # noqa: NPY002 - the global one
    return {
        "python": random.getstate(),
        "numpy": [name, words.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into a state of :func:`get_random_state`; tuples may be lists."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002 - the global one
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
