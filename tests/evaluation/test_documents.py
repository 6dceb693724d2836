"""Scores of documents: the sums of the plain model's, by document and by position."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from maha_attn.evaluation.documents import (
    document_units,
    score_documents,
    split_documents,
    spread_windows,
)
from maha_attn.models import MahaConfig, MahaForCausalLM

LENGTH = 12


def test_split_after_every_end() -> None:
    parts = split_documents(np.array([5, 6, 0, 7, 0, 0, 8, 9]), end=0)
    assert [part.tolist() for part in parts] == [[5, 6, 0], [7, 0], [8, 9]]


def test_scores_are_the_models() -> None:
    torch.manual_seed(0)
    model = MahaForCausalLM(
        MahaConfig(
            **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "window": 4},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_scales": 2},
        )
    )
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 11, n) for n in (30, 12, 7)]
    units = document_units(documents, [b"ab"] * 11, LENGTH)
    found = score_documents(model, documents, units, LENGTH, batch_size=2)
    by_position: dict[int, list[float]] = {}
    for document, scored in zip(documents, found["documents"], strict=True):
        total, right = 0.0, 0
        bins = np.zeros((4, 2))
        for start in range(0, len(document), LENGTH):
            window = torch.from_numpy(document[start : start + LENGTH])
            with torch.no_grad():
                logits = model(input_ids=window[None]).logits[0, :-1]
            losses = cross_entropy(logits, window[1:], reduction="none").tolist()
            total += sum(losses)
            right += int((logits.argmax(-1) == window[1:]).sum())
            for before, loss in enumerate(losses, start=1):
                by_position.setdefault(int(math.log2(before)), []).append(loss)
                bins[int(math.log2(before))] += loss, 1
        assert scored["nll"] == pytest.approx(total, rel=1e-5)
        assert scored["correct"] == right
        np.testing.assert_allclose(scored["positions"], bins, atol=1e-4)
    assert [unit["tokens"] for unit in units] == [27, 11, 6]
    assert [unit["bytes"] for unit in units] == [54, 22, 12]
    assert [(p["from"], p["to"]) for p in found["positions"]] == [(1, 2), (2, 4), (4, 8), (8, 12)]
    for position, losses in zip(found["positions"], by_position.values(), strict=True):
        assert position["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    _check_errors(found)


def _check_errors(found: dict) -> None:
    """Errors are those of resampled books: about what two moments of their means give."""
    per_book = np.array([document["positions"] for document in found["documents"]])
    for i, position in enumerate(found["positions"]):
        sums, counts = per_book[per_book[:, i, 1] > 0][:, i].T
        rest = sums - sums.sum() / counts.sum() * counts
        expected = np.sqrt((rest**2).sum()) / counts.sum()
        assert position["error"] == pytest.approx(expected, rel=0.35)


def test_windows_are_whole_and_spread_over_all_documents() -> None:
    documents = [np.arange(start, start + n) for start, n in ((0, 25), (100, 9), (200, 41))]
    starts = [0, 10, 200, 210, 220, 230]
    assert spread_windows(documents, 10, 9)[:, 0].tolist() == starts
    assert spread_windows(documents, 10, 3)[:, 0].tolist() == [0, 200, 230]
    assert spread_windows(documents, 10, 9).shape == (6, 10)
    assert spread_windows(documents, 50, 9).shape == (0, 50)
