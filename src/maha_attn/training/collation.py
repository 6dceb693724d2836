"""Batches whose random parts can be repeated."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

Collator = Callable[[list[dict[str, Any]]], Any]
"""Makes a batch of rows."""


class RepeatableCollator:
    """Gives a collator random numbers that depend on the seed, the epoch and the rows alone.

    A collator that draws masks from the global generator draws batches ahead of the step that uses
    them; after resuming it would draw others than an uninterrupted run.

    Args:
        collator: Draws from torch's global generator, if at all.
        seed: Of the run.
    """

    def __init__(self, collator: Collator, seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = 0

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """The batch."""
        key = repr((self.seed, self.epoch, features[0])).encode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8]))
            return self.collator(features)
