"""Perplexity: every scored token once, the numbers as computed by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maha_attn.evaluation.perplexity import (
    TextUnits,
    count_units,
    perplexities,
    score_tokens,
    scored_positions,
    windows,
)


class Counter(torch.nn.Module):
    """A causal model: p(x[t+1] = x) grows with how often x stands in x[..t]."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 5).cumsum(1).float())


def nll_by_hand(tokens: np.ndarray, start: int, t: int) -> float:
    counts = np.bincount(tokens[start:t], minlength=5)
    return math.log(float(np.exp(counts).sum())) - int(counts[tokens[t]])


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_every_token_is_scored_once(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, length - 1))
    positions = scored_positions(num_tokens, length, stride).tolist()
    firsts = range(0, num_tokens, length) if stride is None else [0]
    assert positions == sorted(set(range(num_tokens)) - set(firsts))
    for w in windows(num_tokens, length, stride):
        assert w.stop - w.start <= length
        assert w.first == 1 or stride is None or w.first - w.start == length - stride


@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_nll_by_hand(stride: int | None, batch_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 23)
    expected = [
        nll_by_hand(tokens, w.start, t)
        for w in windows(23, 6, stride)
        for t in range(w.first, w.stop)
    ]
    found = score_tokens(Counter(), tokens, 6, stride, batch_size)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found.nll, expected, rtol=1e-6)
    likeliest = [
        int(np.bincount(tokens[w.start : t], minlength=5).argmax()) == tokens[t]
        for w in windows(23, 6, stride)
        for t in range(w.first, w.stop)
    ]
    assert found.correct.tolist() == likeliest
    assert 0 < found.correct.sum() < len(likeliest)


def test_units_and_perplexities_by_hand() -> None:
    bytes_of = [b"", b"the", b" c", b"at", b"\n", b" so"]
    #         the  c  at  so  \n  the  <end>  at
    tokens = np.array([1, 2, 3, 5, 4, 1, 0, 3])
    units = count_units(tokens, np.array([1, 2, 3, 5, 6, 7]), bytes_of)
    # " cat" begins once, " so", "the", "at" after the end of the text; "the" 1 is not scored
    assert (units.tokens, units.words, units.bytes) == (6, 4, 2 + 2 + 3 + 3 + 0 + 2)
    nll = np.full(6, math.log(8))
    found = perplexities(nll, units)
    assert found["perplexity"] == pytest.approx(8)
    assert found["word_perplexity"] == pytest.approx(8 ** (6 / 4))
    assert found["bits_per_byte"] == pytest.approx(3 * 6 / 12)
    # A text without a space, or with words too long for a number; tokens without bytes.
    assert perplexities(nll, TextUnits(tokens=6, words=0, bytes=9))["word_perplexity"] is None
    many = np.full(1000, math.log(8))
    assert perplexities(many, TextUnits(tokens=1000, words=1, bytes=900))["word_perplexity"] is None
    assert perplexities(nll, TextUnits(tokens=6, words=0, bytes=0))["bits_per_byte"] is None
