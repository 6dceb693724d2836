"""How far a measured value can be trusted: 95 % intervals over what made it vary.

Two things vary: training, by its seed, and the test part (books, sentences, questions), which is a
sample. Each one alone gives the half-width ``t·e`` by its standard error ``e`` and Student's ``t``
of its degrees of freedom (12.7 at two seeds, 4.3 at three, 2.1 at 19 books); together
``√(Σ (t·e)²)`` (Graybill and Wang 1980). Rows are compared in pairs, seed by seed and on the same
test part. A source that could not be measured is named in ``missing``; without it nothing is
decided.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from maha_attn.experiments.definition import Claim
from maha_attn.experiments.results import Result
from maha_attn.experiments.statistics import RESAMPLES, paired_books_error
from maha_attn.report.metrics import Metric, metric, value

Pair = tuple[Result, Result]
_Group = TypeVar("_Group", bound=tuple[Result, ...])
Sampled = tuple[float, int] | None
"""A standard error over the test part and its degrees of freedom; None: unknown."""


@dataclass(frozen=True)
class Estimate:
    """A value and the half-width of its 95 % interval.

    Attributes:
        value: The mean over seeds.
        half: 0 for what is counted; None where nothing that varies was measured.
        seeds: How many.
        over: The sources of variance that ``half`` holds.
        missing: Those that it lacks.
    """

    value: float
    half: float | None
    seeds: int
    over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def half_width(error: float, degrees: int) -> float:
    """Of the 95 % interval of a mean with this standard error."""
    return error * float(stdtrit(degrees, 0.975))


def estimate(
    measure: str, column: str, row: Sequence[Result], than: Sequence[Result] | None = None
) -> Estimate | None:
    """A ``value`` of a row, or its ``difference`` or ``reduction`` against another one.

    Returns:
        None where no result of the row (and of the other one, with the same seed) has the number;
        numbers that depend on the device must be of one device and one commit.
    """
    known = metric(column)
    if than is None:
        having = [result for result in row if value(result, column) is not None]
        values = [value(result, column) or 0.0 for result in having]
        sample = _SAMPLES.get(column, lambda _: None)(having) if having else None
        return combine(known, values, sample) if having else None
    pairs = _pairs(known, column, row, than)
    if not pairs:
        return None
    numbers = [(value(a, column) or 0.0, value(b, column) or 0.0) for a, b in pairs]
    if measure == "reduction":
        return combine(known, [1 - a / b for a, b in numbers], None)
    return combine(known, [a - b for a, b in numbers], sample_error(column, pairs))


def slope(claim: Claim, row: Sequence[Result]) -> Estimate | None:
    """Least squares of ``log value`` against ``log length``: the mean over runs of one place."""
    known, (low, high) = metric(claim.metric), claim.between or (0, math.inf)
    runs, slopes = [(result,) for result in row], []
    for (result,) in _in_one_place(runs) if known.by_device else runs:
        curves = result["curves"]
        points = [
            (math.log(n), math.log(v))
            for n, v in zip(curves["length"], curves.get(claim.metric, []), strict=False)
            if low <= n <= high and v is not None
        ]
        if len(points) > 2:
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return combine(known, slopes, None) if slopes else None


def sample_error(column: str, pairs: Sequence[Pair]) -> Sampled:
    """Standard error over the test part of a paired difference, and its degrees of freedom.

    Without results by example the error of an accuracy is that of two independent samples, which
    is not smaller than the paired one unless two rows err on different examples. None: unknown.
    """
    if column == "bits_per_byte":
        sides = [[result["documents"] for result in side] for side in zip(*pairs, strict=True)]
        return paired_books_error(*sides), len(sides[0][0]) - 1
    if column == "bleu":
        return _bleu_error(pairs)
    scores = [(_by_example(a, column), _by_example(b, column)) for a, b in pairs]
    found = [(a, b) for a, b in scores if a and b and len(a) == len(b)]
    if len(found) == len(pairs) and len({len(a) for a, _ in found}) == 1:
        by_seed = [[x - y for x, y in zip(a, b, strict=True)] for a, b in found]
        examples = [statistics.fmean(seeds) for seeds in zip(*by_seed, strict=True)]
        size = len(examples)
        return (statistics.stdev(examples) / math.sqrt(size), size - 1) if size > 1 else None
    if column == "accuracy":
        size = min(_test_rows(result) for pair in pairs for result in pair)
        sides = zip(*pairs, strict=True)
        means = [statistics.fmean(value(r, column) or 0.0 for r in side) for side in sides]
        return math.sqrt(sum(p * (100 - p) for p in means) / size), size - 1
    return None


def resamples(size: int) -> NDArray[np.float64]:
    """How often each of ``size`` things is drawn, a row for each resample."""
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return drawn.astype(float)


def bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU (Papineni et al. 2002) of sums of ``[length, reference's, matches 1 … 4, n-grams]``."""
    with np.errstate(divide="ignore", invalid="ignore"):  # Sentences of less than four words.
        precision = np.log(sums[..., 2:6] / sums[..., 6:]).mean(-1)
    return 100 * np.exp(precision + np.minimum(0, 1 - sums[..., 1] / sums[..., 0]))


def _bleu_error(pairs: Sequence[Pair]) -> Sampled:
    """Standard error over sentences of a difference in BLEU; None in files without their counts."""
    if not all(result.content.get("bleu_statistics") for pair in pairs for result in pair):
        return None
    sides = [
        np.array([r["bleu_statistics"] for r in side], float) for side in zip(*pairs, strict=True)
    ]
    if sides[0].shape != sides[1].shape:
        return None
    drawn = resamples(sides[0].shape[1])
    first, second = (bleu(drawn @ side).mean(0) for side in sides)
    return float(np.std(first - second, ddof=1)), sides[0].shape[1] - 1


def _static_error(row: Sequence[Result]) -> Sampled:
    """Standard error over books of what is lost with weights held at their means."""
    own = [result["documents"] for result in row]
    if not all("static_nll" in document for seed in own for document in seed):
        return None
    held = [[{**document, "nll": document["static_nll"]} for document in seed] for seed in own]
    return paired_books_error(held, own), len(own[0]) - 1


def _windows_error(names: Sequence[str]) -> Callable[[Sequence[Result]], Sampled]:
    """Standard error over windows of a share of weight, less another one, of those names."""

    def find(row: Sequence[Result]) -> Sampled:
        seeds = [[result["fusion"].get(name) for name in names] for result in row]
        if not all(all(shares) for shares in seeds):
            return None
        own, *less = np.array(seeds, dtype=float).mean(0)  # [windows] each
        windows = own - sum(less)
        size = len(windows)
        return (float(windows.std(ddof=1)) / math.sqrt(size), size - 1) if size > 1 else None

    return find


_MOVED, _BEFORE = "moved_by_window", "moved_untrained_by_window"
_SAMPLES: dict[str, Callable[[Sequence[Result]], Sampled]] = {
    "static_cost": _static_error,
    "weight_moved": _windows_error([_MOVED]),
    "weight_moved_untrained": _windows_error([_BEFORE]),
    "weight_moved_gain": _windows_error([_MOVED, _BEFORE]),
}
"""Of a row's own value: its standard error over the test part, and the degrees of freedom."""


def combine(known: Metric, values: list[float], sample: Sampled) -> Estimate:
    """An estimate from the values of seeds and the error over the test part.

    Args:
        known: The metric.
        values: By seed.
        sample: Standard error over the test part and its degrees of freedom; None: unknown.
    """
    mean, seeds = statistics.fmean(values), len(values)
    if known.exact:
        return Estimate(mean, 0.0, seeds)
    halves: dict[str, float] = {}
    if seeds > 1:
        error = statistics.stdev(values) / math.sqrt(seeds)
        halves["seeds"] = half_width(error, seeds - 1)
    if sample is not None and not math.isnan(sample[0]):
        halves[known.sample] = half_width(*sample)
    sources = ["seeds"] + [known.sample] * bool(known.sample)
    missing = tuple(source for source in sources if source not in halves)
    half = math.hypot(*halves.values()) if halves else None
    return Estimate(mean, half, seeds, tuple(halves), missing)


def _pairs(known: Metric, column: str, row: Sequence[Result], than: Sequence[Result]) -> list[Pair]:
    """Results of the same seed that have the number; times of one place alone."""
    pairs = [
        (a, b)
        for a in row
        for b in than
        if a["seed"] == b["seed"] and value(a, column) is not None and value(b, column) is not None
    ]
    return _in_one_place(pairs) if known.by_device else pairs


def _in_one_place(groups: Sequence[_Group]) -> list[_Group]:
    """Of groups of results, those of one device and commit: where most are, or else the latest."""
    places: dict[tuple[str, str], list[_Group]] = {}
    for group in groups:
        first, *others = ((result["device"], result["commit"]) for result in group)
        if all(other == first for other in others):
            places.setdefault(first, []).append(group)
    return max(
        places.values(), key=lambda own: (len(own), max(g[0]["date"] for g in own)), default=[]
    )


def _by_example(result: Result, column: str) -> list[float] | None:
    """Scores of the test examples in percent, if they are those that the metric is the mean of."""
    name = {"accuracy": "correct", "forced_f1": "scores"}.get(column)
    stored = result.content.get(name or "")
    if not stored:
        return None
    scores = [100 * float(score) for score in stored]
    return scores if abs(statistics.fmean(scores) - (value(result, column) or 0)) < 0.01 else None


def _test_rows(result: Result) -> int:
    return result["data"]["rows"][result.content.get("part", "test")]
