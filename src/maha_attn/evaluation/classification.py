"""How well texts are classified: accuracy and F1, beside always saying the commonest class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """How a classifier is scored.

    Args:
        batch_size: Rows at once.
    """

    batch_size: int = 64


def classification_scores(logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Accuracy and F1, in percent.

    Args:
        logits: ``[n, num_labels]``.
        labels: ``[n]``, from 0.

    Returns:
        ``accuracy``; ``f1``, the mean over classes (macro) of ``2PR/(P+R)`` with a class's
        precision P and recall R; and ``majority_accuracy`` of the commonest class among ``labels``.
    """
    predicted = logits.argmax(-1)
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    return {
        "accuracy": 100 * float(accuracy_score(labels, predicted)),
        "f1": 100 * float(f1),
        "majority_accuracy": 100 * float(np.bincount(labels).max() / len(labels)),
    }


def confusion(logits: NDArray[Any], labels: NDArray[Any]) -> list[list[int]]:
    """How often a row of the class (first index) was taken for a class (second index)."""
    classes = list(range(logits.shape[-1]))
    return confusion_matrix(labels, logits.argmax(-1), labels=classes).tolist()
