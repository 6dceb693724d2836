"""A claim against what was measured: one verdict and one sentence."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from maha_attn.experiments.definition import Case, Claim
from maha_attn.experiments.results import Result
from maha_attn.experiments.statistics import paired_difference
from maha_attn.report.metrics import metric, value
from maha_attn.report.selection import Selected

Status = Literal["holds", "holds under a condition", "does not hold", "undecided", "not measured"]
STATUSES: tuple[Status, ...] = get_args(Status)
ERRORS = 2
"""So many standard errors decide."""


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: The claim.
        exhibit: The name of the exhibit that decides it.
        status: ``undecided`` where every case is within its error.
        sentence: What was found, case by case.
        measured: Of the first case that was measured, as text; likewise the next two.
        seeds: How many.
        spread: Standard error of the measure.
        conditions: How the conditions differ from the paper's; empty: they do not.
    """

    claim: Claim
    exhibit: str
    status: Status
    sentence: str
    measured: str = "–"
    seeds: str = "–"
    spread: str = "–"
    conditions: str = "–"


@dataclass(frozen=True)
class _Finding:
    case: Case
    measured: float
    error: float
    seeds: int
    exact: bool
    conditions: str


def judge(claim: Claim, selected: Sequence[Selected], exhibit: str) -> Verdict:
    """Compare a claim with the results of its exhibit."""
    findings = [finding for case in claim.cases if (finding := _measure(claim, case, selected))]
    if not findings:
        smoke = any(part.rows and not part.counts for part in selected)
        why = "only a smoke test was run." if smoke else "no run of it is in the results."
        return Verdict(claim, exhibit, "not measured", f"Not measured: {why}")
    outcomes = {"holds": [], "open": [], "fails": []}
    for finding in findings:
        outcomes[_outcome(claim, finding)].append(finding)
    if len(outcomes["holds"]) == len(findings):
        status = "holds"
    elif outcomes["holds"]:
        status = "holds under a condition"
    else:
        status = "does not hold" if outcomes["fails"] else "undecided"
    words = {"holds": "Holds", "open": "Within the error", "fails": "Does not hold"}
    sentences = [
        f"{words[name]} {'; '.join(_describe(claim, f) for f in found)}."
        for name, found in outcomes.items()
        if found
    ]
    missing = [case.condition for case in claim.cases if case not in [f.case for f in findings]]
    if missing:
        sentences.append(f"Not measured {'; '.join(missing)}.")
    first = findings[0]
    return Verdict(
        claim,
        exhibit,
        status,
        " ".join(sentences),
        _text(claim, first.measured),
        "–" if first.exact else str(first.seeds),
        "exact" if first.exact else _error_text(claim, first.error),
        first.conditions,
    )


def _measure(claim: Claim, case: Case, selected: Sequence[Selected]) -> _Finding | None:
    """The claim's measure for one case; None where a row was not run for real."""
    for part in selected:
        if case.experiment not in (None, part.experiment.name) or not part.counts:
            continue
        row = part.rows.get(case.row)
        than = part.rows.get(case.than) if case.than else None
        if not row or (case.than and not than):
            continue
        column = f"{claim.metric}@{claim.at}" if claim.at else claim.metric
        if metric(column).by_device and not part.one_device:
            continue
        conditions = part.conditions
        assert conditions is not None
        slope = claim.measure == "slope"
        found = _slope(claim, row) if slope else _compare(claim, column, row, than)
        if found is not None:
            seeds = min(len(row), len(than or row))
            exact = part.experiment.kind == "flops"
            return _Finding(case, *found, seeds, exact, conditions.differs)
    return None


def _compare(
    claim: Claim, column: str, row: list[Result], than: list[Result] | None
) -> tuple[float, float] | None:
    """A value, a difference or a reduction, and its standard error."""
    first = _mean(row, column)
    if first is None:
        return None
    if than is None:
        return first
    second = _mean(than, column)
    if second is None:
        return None
    if claim.measure == "reduction":
        quotient = first[0] / second[0]
        relative = math.hypot(first[1] / first[0], second[1] / second[0])
        return 1 - quotient, abs(quotient) * relative
    if column == "bits_per_byte":
        pairs = [(a, b) for a in row for b in than if a["seed"] == b["seed"]]
        if pairs:
            return paired_difference(
                [a["documents"] for a, _ in pairs], [b["documents"] for _, b in pairs]
            )
    return first[0] - second[0], math.hypot(first[1], second[1])


def _mean(results: list[Result], column: str) -> tuple[float, float] | None:
    """Mean over seeds and its standard error."""
    values = [v for result in results if (v := value(result, column)) is not None]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _slope(claim: Claim, row: list[Result]) -> tuple[float, float] | None:
    """Least squares of ``log value`` against ``log length`` over the lengths in between."""
    curves = row[0]["curves"]
    low, high = claim.between or (0, math.inf)
    points = [
        (math.log(n), math.log(v))
        for n, v in zip(curves["length"], curves.get(claim.metric, []), strict=False)
        if low <= n <= high and v is not None
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope, 0.0


def _outcome(claim: Claim, finding: _Finding) -> str:
    """Whether a case holds, fails, or is within its error."""
    if claim.at_least is not None:
        margin = finding.measured - claim.at_least
    else:
        assert claim.at_most is not None
        margin = claim.at_most - finding.measured
    if not math.isnan(finding.error) and abs(margin) < ERRORS * finding.error:
        return "open"
    return "holds" if margin >= 0 else "fails"


def _describe(claim: Claim, finding: _Finding) -> str:
    """``with windows (91.7 % less)``."""
    words = _text(claim, finding.measured)
    if claim.measure == "reduction":
        less = "less" if finding.measured >= 0 else "more"
        words = f"{abs(finding.measured):.1%} {less}".replace("%", " %")
    elif claim.measure == "slope":
        words = f"slope {words}"
    if finding.error and not math.isnan(finding.error):
        words = f"{words} ± {_error_text(claim, finding.error)}"
    if claim.measure == "difference":
        words = f"{words} {metric(claim.metric).unit}".rstrip()
    if finding.seeds == 1 and not finding.exact and claim.measure == "difference":
        words += ", one seed"
    return f"{finding.case.condition} ({words})"


def _text(claim: Claim, number: float) -> str:
    if claim.percent:
        return f"{number:.1%}".replace("%", " %")
    if claim.measure == "slope":
        return f"{number:.2f}"
    known = metric(claim.metric)
    sign = "+" if claim.measure == "difference" else ""
    return f"{number / known.scale:{sign},.{known.digits}f}".replace("-", "−")


def _error_text(claim: Claim, error: float) -> str:
    if error == 0 or math.isnan(error):
        return "–"
    return _text(claim, error).lstrip("+")
