"""Means over seeds, and standard errors by bootstrap over documents (Efron 1979).

A document is ``{"nll", "tokens", "words", "bytes"}``: the sum of its scored tokens' negative
log-probabilities in nats and what they stand for. Documents, not tokens, are resampled: tokens of
one book are not independent.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence

Document = dict[str, float]
RESAMPLES = 1000


def bits_per_byte(documents: Sequence[Document]) -> float:
    """``Σ nll / (Σ bytes · log 2)``."""
    nll, size = (math.fsum(d[name] for d in documents) for name in ("nll", "bytes"))
    return nll / size / math.log(2)


def bootstrap_error(statistic: Callable[[Sequence[int]], float], size: int) -> float:
    """Standard error of a statistic of ``size`` documents, given the indices of a resample."""
    if size < 2:
        return math.nan
    generator = random.Random(0)
    indices = range(size)
    draws = (generator.choices(indices, k=size) for _ in range(RESAMPLES))
    return statistics.stdev(map(statistic, draws))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and their standard deviation; None for a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_books_error(
    first: Sequence[Sequence[Document]], second: Sequence[Sequence[Document]]
) -> float:
    """Standard error, over books, of a difference in bits per byte of two rows.

    The same resample of books is taken for both sides and all seeds, so what makes a book hard
    cancels. NaN for a single document.

    Args:
        first, second: Documents of every seed.
    """

    def difference(indices: Sequence[int]) -> float:
        sides = [
            statistics.fmean(bits_per_byte([seed[i] for i in indices]) for seed in side)
            for side in (first, second)
        ]
        return sides[0] - sides[1]

    return bootstrap_error(difference, len(first[0]))
