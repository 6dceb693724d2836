"""A model's output for every row of a dataset."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    rows: Dataset,
    collator: Callable[[list[Any]], Any],
    batch_size: int,
    description: str,
) -> Iterator[tuple[Any, Any]]:
    """Run a model over rows, long ones first, so that a batch holds little padding.

    Yields:
        The numbers of a batch's rows, and the model's output for the batch.
    """
    model.eval()
    order = np.argsort([-length for length in rows["length"]], kind="stable")
    rows = rows.remove_columns("length")
    for start in tqdm(range(0, len(rows), batch_size), desc=description, delay=2):
        chosen = order[start : start + batch_size]
        batch = collator([rows[int(i)] for i in chosen])
        yield chosen, model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
