"""Scores of documents: the sums of the plain model's, by document and by position."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from maha_attn.evaluation.documents import document_units, score_documents, split_documents
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
        total = 0.0
        for start in range(0, len(document), LENGTH):
            window = torch.from_numpy(document[start : start + LENGTH])
            with torch.no_grad():
                logits = model(input_ids=window[None]).logits[0, :-1]
            losses = cross_entropy(logits, window[1:], reduction="none").tolist()
            total += sum(losses)
            for before, loss in enumerate(losses, start=1):
                by_position.setdefault(int(math.log2(before)), []).append(loss)
        assert scored["nll"] == pytest.approx(total, rel=1e-5)
    assert [unit["tokens"] for unit in units] == [27, 11, 6]
    assert [unit["bytes"] for unit in units] == [54, 22, 12]
    assert [(p["from"], p["to"]) for p in found["positions"]] == [(1, 2), (2, 4), (4, 8), (8, 12)]
    for position, losses in zip(found["positions"], by_position.values(), strict=True):
        assert position["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
