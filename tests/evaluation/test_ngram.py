"""The n-gram baselines against counting by hand."""

import numpy as np
import pytest

from maha_attn.evaluation.ngram import GRID, Counts, NGrams, fit_ngrams

# a=0, b=1, c=2 in a vocabulary of 4: aabac
STREAM = np.array([0, 0, 1, 0, 2])


def test_unigram_by_hand() -> None:
    counts = Counts.of(STREAM, 4)
    # c(a)=3, c(b)=1, c(c)=1, c(d)=0, of 5; k = 0.5 adds 2 in all
    expected = [3.5 / 7, 1.5 / 7, 1.5 / 7, 0.5 / 7]
    np.testing.assert_allclose(counts.unigram(np.arange(4), 0.5), expected)


def test_bigram_by_hand() -> None:
    counts = Counts.of(STREAM, 4)
    unigram = np.array([3.5, 1.5, 1.5, 0.5]) / 7
    # after a (3 times with a follower): a, b, c once each; after b (once): a; c and d: never
    after = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    for before in range(4):
        expected = (after[before] + 2.0 * unigram) / (after[before].sum() + 2.0)
        found = counts.bigram(np.arange(4), np.full(4, before), 0.5, 2.0)
        np.testing.assert_allclose(found, expected)
        assert found.sum() == pytest.approx(1)


def test_nll_is_of_the_asked_positions() -> None:
    ngrams = NGrams(Counts.of(STREAM, 4), k=0.5, m=2.0)
    held_out = np.array([3, 0, 1])
    unigram = np.array([3.5, 1.5, 1.5, 0.5]) / 7
    expected = -np.log([unigram[0], (1 + 2 * unigram[1]) / 5])
    np.testing.assert_allclose(ngrams.bigram_nll(held_out, np.array([1, 2])), expected)
    np.testing.assert_allclose(ngrams.unigram_nll(held_out, np.array([2])), -np.log(unigram[1:2]))


def test_fit_chooses_smoothing_on_training_text_only() -> None:
    rng = np.random.default_rng(0)
    # Markov chain over 20 tokens: pairs tell much, so little smoothing is best and bigrams win.
    chain = np.empty(4000, np.int64)
    chain[0] = 0
    for t in range(1, len(chain)):
        chain[t] = (chain[t - 1] * 7 + rng.integers(3)) % 20
    ngrams = fit_ngrams(chain[:3000], 20)
    positions = np.arange(3001, 4000)
    bigram = ngrams.bigram_nll(chain, positions).mean()
    assert bigram == pytest.approx(np.log(3), abs=0.05)
    assert ngrams.unigram_nll(chain, positions).mean() > 2 * bigram
    assert fit_ngrams(chain[:3000], 20).m == ngrams.m < 10
    # Independent tokens: pairs tell nothing, so the bigram leans on the unigram as far as it can.
    assert fit_ngrams(rng.integers(0, 20, 3000), 20).m == max(GRID)
