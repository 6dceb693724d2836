"""Bootstrap errors against closed forms."""

import math
import random

import pytest

from maha_attn.experiments.statistics import (
    bits_per_byte,
    bootstrap_error,
    mean_and_spread,
    paired_books_error,
)


def documents(rates: list[float], size: float = 1000.0) -> list[dict[str, float]]:
    """Documents of equal size with so many bits per byte each."""
    return [{"nll": rate * size * math.log(2), "bytes": size} for rate in rates]


RATES = [random.Random(1).gauss(2.0, 0.3) for _ in range(40)]


def test_bits_per_byte_weighs_documents_by_their_size() -> None:
    assert bits_per_byte(documents([1.0]) + documents([2.0], 3000)) == pytest.approx(1.75)


def test_bootstrap_finds_the_error_of_a_mean() -> None:
    def mean(indices: object) -> float:
        return bits_per_byte([documents(RATES)[i] for i in indices])  # pyright: ignore

    center = sum(RATES) / len(RATES)
    expected = math.sqrt(sum((r - center) ** 2 for r in RATES)) / len(RATES)
    assert bootstrap_error(mean, len(RATES)) == pytest.approx(expected, rel=0.08)
    assert math.isnan(bootstrap_error(mean, 1))


def test_what_makes_a_book_hard_cancels_in_a_paired_difference() -> None:
    easier = [rate - 0.01 for rate in RATES]
    assert paired_books_error([documents(RATES)], [documents(easier)]) == pytest.approx(0, abs=1e-9)
    half = [rate - (0.02 if i % 2 else 0) for i, rate in enumerate(RATES)]
    expected = 0.01 / math.sqrt(len(RATES))  # books differ by 0 or 0.02
    found = paired_books_error([documents(RATES)], [documents(half)])
    assert found == pytest.approx(expected, rel=0.08)


def test_spread_needs_two_seeds() -> None:
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
