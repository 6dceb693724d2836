"""Accuracy and F1 by hand."""

import numpy as np
import pytest

from maha_attn.evaluation.classification import classification_scores, confusion

LOGITS = np.array([[2, 0, 1], [0, 1, 0], [3, 1, 2], [0, 0, 1]])  # 0, 1, 0, 2
LABELS = np.array([0, 1, 1, 1])


def test_scores_by_hand() -> None:
    found = classification_scores(LOGITS, LABELS)
    assert found["accuracy"] == 50
    assert found["majority_accuracy"] == 75
    # class 0: P 1/2, R 1; class 1: P 1, R 1/3; class 2: nothing right
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_confusion_has_every_class() -> None:
    assert confusion(LOGITS, LABELS) == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
