"""Language-model scores of whole documents: per document, and by position in the context."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from maha_attn.evaluation.perplexity import count_units, scored_positions, token_nll


def split_documents(tokens: NDArray[np.int64], end: int) -> list[NDArray[np.int64]]:
    """Cut a stream after every end-of-text token."""
    ends = np.flatnonzero(tokens == end) + 1
    return [document for document in np.split(tokens, ends) if len(document) > 1]


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
        ``documents``: for each its units and ``nll``, the sum over its scored tokens in nats.
        ``positions``: mean ``nll`` of the tokens that have ``from`` to ``to - 1`` tokens before
        them in their window, over all documents, for powers of two up to ``length``.
    """
    edges = np.append(2 ** np.arange(int(np.log2(length - 1)) + 1), length)
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    scored = []
    for tokens, unit in zip(documents, units, strict=True):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            nll = token_nll(model, tokens, length, None, batch_size)
        before = scored_positions(len(tokens), length, None) % length
        bins = np.searchsorted(edges, before, side="right") - 1
        sums += np.bincount(bins, nll, len(sums))
        counts += np.bincount(bins, minlength=len(counts))
        scored.append({**unit, "nll": float(nll.sum())})
    positions = [
        {"from": int(low), "to": int(high), "nll": float(total / count)}
        for low, high, total, count in zip(edges, edges[1:], sums, counts, strict=False)
        if count
    ]
    return {"documents": scored, "positions": positions}


def document_units(
    documents: Sequence[NDArray[np.int64]], bytes_of: list[bytes], length: int
) -> list[dict[str, int]]:
    """What the scored tokens of each document stand for: ``tokens``, ``words``, ``bytes``."""
    units = []
    for tokens in documents:
        found = count_units(tokens, scored_positions(len(tokens), length, None), bytes_of)
        units.append({"tokens": found.tokens, "words": found.words, "bytes": found.bytes})
    return units
