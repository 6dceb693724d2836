"""Unigram and bigram models of tokens: what counting alone achieves on the same text.

With counts ``c`` over the training stream, a vocabulary of ``V`` and pseudo-counts ``k, m > 0``:

    unigram  p(x)     = (c(x) + k) / (Σ c + kV)
    bigram   p(x | y) = (c(y, x) + m p(x)) / (c(y) + m)

so a bigram never seen falls back to the unigram, and the more often ``y`` was seen, the less
(a Dirichlet prior; MacKay and Peto 1995). ``k`` and ``m`` are those of a grid that predict the last
tenth of the training stream best from its first nine, and the counts are then those of all of it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)

Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class Counts:
    """How often each token, and each pair, occurs in a stream."""

    tokens: NDArray[np.int64]
    contexts: NDArray[np.int64]
    pair_codes: NDArray[np.int64]
    pairs: NDArray[np.int64]

    @classmethod
    def of(cls, stream: Tokens, vocab_size: int) -> "Counts":
        """Count a stream's tokens and pairs; its last token is no pair's first."""
        ids = stream.astype(np.int64)
        codes, pairs = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        return cls(
            tokens=np.bincount(ids, minlength=vocab_size),
            contexts=np.bincount(ids[:-1], minlength=vocab_size),
            pair_codes=codes,
            pairs=pairs,
        )

    def unigram(self, token: Tokens, k: float) -> NDArray[np.float64]:
        """``p(token)``."""
        return (self.tokens[token] + k) / (self.tokens.sum() + k * len(self.tokens))

    def bigram(self, token: Tokens, before: Tokens, k: float, m: float) -> NDArray[np.float64]:
        """``p(token | before)``."""
        code = before.astype(np.int64) * len(self.tokens) + token
        place = np.searchsorted(self.pair_codes, code).clip(max=len(self.pair_codes) - 1)
        pairs = np.where(self.pair_codes[place] == code, self.pairs[place], 0)
        return (pairs + m * self.unigram(token, k)) / (self.contexts[before] + m)


@dataclass(frozen=True)
class NGrams:
    """A unigram and a bigram model with their pseudo-counts."""

    counts: Counts
    k: float
    m: float

    def unigram_nll(self, stream: Tokens, positions: Tokens) -> NDArray[np.float64]:
        """``-log p(x[t])`` at the positions ``t``."""
        return -np.log(self.counts.unigram(stream[positions], self.k))

    def bigram_nll(self, stream: Tokens, positions: Tokens) -> NDArray[np.float64]:
        """``-log p(x[t] | x[t-1])`` at the positions ``t``."""
        token, before = stream[positions], stream[positions - 1]
        return -np.log(self.counts.bigram(token, before, self.k, self.m))


def fit_ngrams(stream: Tokens, vocab_size: int) -> NGrams:
    """Choose the pseudo-counts on the end of the training stream, then count all of it."""
    cut = len(stream) - len(stream) // 10
    counts, positions = Counts.of(stream[:cut], vocab_size), np.arange(cut, len(stream))

    def unigram_loss(k: float) -> float:
        return NGrams(counts, k, 1.0).unigram_nll(stream, positions).sum()

    k = min(GRID, key=unigram_loss)

    def bigram_loss(m: float) -> float:
        return NGrams(counts, k, m).bigram_nll(stream, positions).sum()

    return NGrams(Counts.of(stream, vocab_size), k, min(GRID, key=bigram_loss))
