"""Language-model scores of whole documents: per document, and by position in the context."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from maha_attn.evaluation.perplexity import count_units, score_tokens, scored_positions
from maha_attn.experiments.statistics import bootstrap_error


def split_documents(tokens: NDArray[np.int64], end: int) -> list[NDArray[np.int64]]:
    """Cut a stream after every end-of-text token."""
    ends = np.flatnonzero(tokens == end) + 1
    return [document for document in np.split(tokens, ends) if len(document) > 1]


def spread_windows(
    documents: Sequence[NDArray[np.int64]], length: int, count: int
) -> NDArray[np.int64]:
    """At most ``count`` whole windows, spread evenly over all documents; none where all are short.

    Returns:
        ``[R, length]``.
    """
    whole = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    ]
    places = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)
    return np.array([whole[place] for place in places], np.int64).reshape(-1, length)


def score_documents(
    model: PreTrainedModel,
    documents: Sequence[NDArray[np.int64]],
    units: Iterable[dict[str, int]],
    length: int,
    batch_size: int,
    bf16: bool = False,
) -> dict[str, Any]:
    """Score documents, each from its own first token on, in windows that do not overlap.

    Args:
        model: A causal language model.
        documents: Their tokens.
        units: Of :func:`document_units`.
        length: Tokens in a window.
        batch_size: Windows at once.
        bf16: Run the model in bf16; log-probabilities are fp32 in any case.

    Returns:
        ``positions``: mean ``nll`` of the tokens that have ``from`` to ``to - 1`` tokens before
        them in their window, over all documents, for powers of two up to ``length``, and its
        ``error`` by bootstrap over documents (None for a single one).
        ``documents``: for each its units, ``nll``, the sum over its scored tokens in nats,
        ``correct``, how many of them were the likeliest, and ``positions``, the sum of ``nll`` and
        the number of tokens ``[nll, tokens]`` of each of the bins above.
    """
    edges = np.append(2 ** np.arange(int(np.log2(length - 1)) + 1), length)
    sums, counts, scored = [], [], []
    for tokens, unit in zip(documents, units, strict=True):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scores = score_tokens(model, tokens, length, None, batch_size)
        before = scored_positions(len(tokens), length, None) % length
        bins = np.searchsorted(edges, before, side="right") - 1
        sums.append(np.bincount(bins, scores.nll, len(edges) - 1))
        counts.append(np.bincount(bins, minlength=len(edges) - 1))
        correct = int(scores.correct.sum())
        scored.append({**unit, "nll": float(scores.nll.sum()), "correct": correct})
    filled = np.flatnonzero(np.sum(counts, 0))
    sums, counts = np.array(sums)[:, filled], np.array(counts)[:, filled]
    for document, nll, tokens in zip(scored, sums, counts, strict=True):
        pairs = zip(nll, tokens, strict=True)
        document["positions"] = [[round(float(n), 4), int(t)] for n, t in pairs]
    positions = [
        {"from": int(edges[b]), "to": int(edges[b + 1]), **_mean(sums[:, i], counts[:, i])}
        for i, b in enumerate(filled)
    ]
    return {"documents": scored, "positions": positions}


def _mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean of a bin and its error, over the documents that reach it."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    error = bootstrap_error(lambda i: float(sums[i].sum() / counts[i].sum()), len(sums))
    return {
        "nll": float(sums.sum() / counts.sum()),
        "error": None if math.isnan(error) else error,
    }


def document_units(
    documents: Sequence[NDArray[np.int64]], bytes_of: list[bytes], length: int
) -> list[dict[str, int]]:
    """What the scored tokens of each document stand for: ``tokens``, ``words``, ``bytes``."""
    units = []
    for tokens in documents:
        found = count_units(tokens, scored_positions(len(tokens), length, None), bytes_of)
        units.append({"tokens": found.tokens, "words": found.words, "bytes": found.bytes})
    return units
