"""Perplexity of held-out text: every scored token is predicted exactly once.

The text is one stream of ``n`` tokens ``x``; ``nll[t] = -log p(x[t] | what stands before it)`` in
nats. The perplexity per token is ``exp(Σ nll / tokens)``, per word ``exp(Σ nll / words)``, and the
bits per byte are ``Σ nll / (bytes · log 2)``; the sums go over the scored tokens.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Window:
    """Tokens ``start … stop-1`` are read, of which ``first … stop-1`` are scored."""

    start: int
    first: int
    stop: int


def windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[Window]:
    """Cut a stream into windows whose scored parts do not overlap.

    Args:
        num_tokens: Tokens in the stream.
        length: Tokens in a window.
        stride: Tokens by which the window moves on, at most ``length - 1``; every token but the
            first is scored, with at least ``length - stride`` tokens before it where there are
            so many. None: windows do not touch, and the first token of each is not scored.
    """
    assert stride is None or 1 <= stride < length
    scored = 0
    for start in range(0, num_tokens, stride or length):
        stop = min(start + length, num_tokens)
        first = max(scored, start + 1)
        if first < stop:
            yield Window(start, first, stop)
        scored = stop
        if stop == num_tokens:
            break


def scored_positions(num_tokens: int, length: int, stride: int | None) -> NDArray[np.int64]:
    """The positions of the stream that :func:`windows` scores, in order."""
    spans = [np.arange(w.first, w.stop) for w in windows(num_tokens, length, stride)]
    return np.concatenate(spans) if spans else np.empty(0, np.int64)


class TokenScores(NamedTuple):
    """Of every scored token, in the order of :func:`scored_positions`.

    Attributes:
        nll: ``-log p``.
        correct: Whether it was the likeliest.
    """

    nll: NDArray[np.float64]
    correct: NDArray[np.bool_]


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel,
    tokens: NDArray[np.int64],
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> TokenScores:
    """How well every scored token is predicted.

    Short windows are padded at their end, where a causal model does not see it. The logits are
    taken to fp32 before the softmax.
    """
    model.eval()
    todo = list(windows(len(tokens), length, stride))
    nll, correct = [], []
    for i in tqdm(range(0, len(todo), batch_size), desc="Scoring tokens", delay=2):
        batch = todo[i : i + batch_size]
        longest = max(w.stop - w.start for w in batch)
        ids = np.zeros((len(batch), longest), np.int64)
        for row, w in zip(ids, batch, strict=True):
            row[: w.stop - w.start] = tokens[w.start : w.stop]
        inputs = torch.from_numpy(ids).to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
        right = (logits.argmax(-1) == inputs[:, 1:]).cpu().numpy()
        for row, hits, w in zip(
            losses.view(len(batch), -1).cpu().double().numpy(), right, batch, strict=True
        ):
            scored = slice(w.first - 1 - w.start, w.stop - 1 - w.start)
            nll.append(row[scored])
            correct.append(hits[scored])
    return TokenScores(np.concatenate(nll), np.concatenate(correct))


@dataclass(frozen=True, kw_only=True)
class TextUnits:
    """What the scored tokens stand for."""

    tokens: int
    words: int
    bytes: int


def count_units(
    tokens: NDArray[np.int64], positions: NDArray[np.int64], bytes_of: list[bytes]
) -> TextUnits:
    """Count the bytes of the scored tokens, and the words that begin in them.

    A word begins at a byte that is no white space and stands at the start of the text, after a
    token without bytes (end of text) or after white space.
    """
    scored = np.zeros(len(tokens), bool)
    scored[positions] = True
    num_words = num_bytes = 0
    after_space = True
    for token, counts in zip(tokens, scored, strict=True):
        piece = bytes_of[token]
        if counts:
            num_bytes += len(piece)
            padded = piece if after_space else b"x" + piece
            num_words += len(padded.split()) - (not after_space)
        after_space = piece[-1:].isspace() or not piece
    return TextUnits(tokens=len(positions), words=num_words, bytes=num_bytes)


def perplexities(nll: NDArray[np.float64], units: TextUnits) -> dict[str, float | None]:
    """Perplexity per token and per word, and bits per byte.

    None where there is no word or byte, or where words are too long for a number: not every
    language puts spaces between them.
    """
    total = float(nll.sum())
    return {
        "perplexity": _exp(total, units.tokens),
        "word_perplexity": _exp(total, units.words),
        "bits_per_byte": total / units.bytes / math.log(2) if units.bytes else None,
    }


def _exp(total: float, count: int) -> float | None:
    if count == 0 or total / count > math.log(sys.float_info.max):
        return None
    return math.exp(total / count)
