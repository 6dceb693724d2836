"""A claim against what was measured: one verdict and one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from maha_attn.experiments.definition import Case, Claim
from maha_attn.experiments.results import Result
from maha_attn.report.metrics import Metric, metric
from maha_attn.report.selection import Selected
from maha_attn.report.uncertainty import Estimate, estimate, slope

Status = Literal[
    "holds",
    "holds under a condition",
    "does not hold",
    "undecided",
    "not fully measured",
    "not measured",
]
STATUSES: tuple[Status, ...] = get_args(Status)
Outcome = Literal["holds", "fails", "open", "few seeds", "diverged", "control", "missing"]
OUTCOMES: dict[Outcome, str] = {
    "holds": "holds",
    "fails": "does not hold",
    "open": "undecided",
    "few seeds": "fewer than three seeds:",
    "diverged": "training diverged:",
    "control": "beside it:",
    "missing": "not measured:",
}
ENOUGH_SEEDS = 3
"""Two that happen to agree have a small interval, however wide that of the next two would be."""


@dataclass(frozen=True)
class Finding:
    """A case of a claim and what was measured for it.

    Attributes:
        case: The case.
        outcome: ``open``: its 95 % interval holds the claim's bound, or a source of variance is
            unknown; ``few seeds``: training was repeated too seldom to decide anything;
            ``diverged``: some of its runs have no number, and the others are a selection.
        text: The measure with its interval.
        seeds: How many; "–" for what is counted.
        conditions: The paper's own, yes or no.
    """

    case: Case
    outcome: Outcome
    text: str = ""
    seeds: str = "–"
    conditions: str = "–"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: The claim.
        exhibit: The name of the exhibit that decides it.
        status: ``holds`` in every case; ``holds under a condition``: it does in some and does not
            in others; ``not fully measured`` while a case is missing, has few seeds or diverged.
        sentence: What was found, case by case.
        findings: The cases.
    """

    claim: Claim
    exhibit: str
    status: Status
    sentence: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def first(self) -> Finding | None:
        """The first case that was measured and counts."""
        return next((f for f in self.findings if f.outcome not in ("missing", "control")), None)


def judge(claim: Claim, selected: Sequence[Selected], exhibit: str) -> Verdict:
    """Compare a claim with the results of its exhibit."""
    found = [_find(claim, case, selected) for case in claim.cases]
    findings = [f for f in found if f.outcome != "missing" or not f.case.control]
    outcomes = {f.outcome for f in findings if not f.case.control}
    if outcomes == {"missing"}:
        return Verdict(claim, exhibit, "not measured", f"Not measured: {_why(selected)}", findings)
    if outcomes & {"missing", "few seeds", "diverged"}:
        status = "not fully measured"
    elif {"holds", "fails"} <= outcomes:
        status = "holds under a condition"
    elif "fails" in outcomes:
        status = "does not hold"
    else:
        status = "undecided" if "open" in outcomes else "holds"
    return Verdict(claim, exhibit, status, _sentence(findings), findings)


def _why(selected: Sequence[Selected]) -> str:
    """Nothing was measured."""
    if any(part.refused for part in selected):
        return "its results may not stand in one table."
    smoke = any(part.rows and not part.counts for part in selected)
    return "only a smoke test was run." if smoke else "no run of it is in the results."


def _sentence(findings: Sequence[Finding]) -> str:
    """Cases by outcome, as in ``Holds with windows (91.7 % less). Not measured: with a gate.``."""
    sentences = []
    for outcome, word in OUTCOMES.items():
        cases = [
            f"{f.case.condition} ({f.text})" if f.text else f.case.condition
            for f in findings
            if f.outcome == outcome
        ]
        if cases:
            sentences.append(f"{word.capitalize()} {'; '.join(cases)}.")
    return " ".join(sentences)


def _find(claim: Claim, case: Case, selected: Sequence[Selected]) -> Finding:
    """The claim's measure for one case; ``missing`` where a row was not run for real."""
    column = f"{claim.metric}@{claim.at}" if claim.at else claim.metric
    for part in selected:
        if case.experiment not in (None, part.experiment.name) or not part.counts:
            continue
        row = part.rows.get(case.row)
        than = part.rows.get(case.than) if case.than else None
        if not row or (case.than and not than):
            continue
        if claim.measure == "slope":
            found = slope(claim, row)
        else:
            found = estimate(claim.measure, column, row, than)
        ended = [_diverged(results) for results in (row, than or [])]
        text = [describe(claim.measure, claim.metric, found, claim.percent)] if found else []
        text += [words for words in ended if words]
        if text:
            known = metric(column)
            seeds = "–" if known.exact else str(found.seeds if found else 0)
            outcome = "diverged" if any(ended) or not found else _outcome(claim, known, found)
            outcome = "control" if case.control else outcome
            return Finding(case, outcome, "; ".join(text), seeds, part.printed(case.row))
    return Finding(case, "missing")


def _diverged(results: Sequence[Result]) -> str:
    """How many of a row's runs have no number; empty: none."""
    ended = sum(result.diverged is not None for result in results)
    return f"{ended} of {len(results)} seeds diverged" if ended else ""


def _outcome(claim: Claim, known: Metric, found: Estimate) -> Outcome:
    if not known.exact and found.seeds < ENOUGH_SEEDS:
        return "few seeds"
    if claim.at_least is not None:
        margin = found.value - claim.at_least
    else:
        assert claim.at_most is not None
        margin = claim.at_most - found.value
    if found.missing or found.half is None or abs(margin) < found.half:
        return "open"
    return "holds" if margin >= 0 else "fails"


def describe(measure: str, name: str, found: Estimate, percent: bool = False) -> str:
    """``91.7 % less``, ``slope 1.14``, ``−0.0245 ± 0.0029 bits per byte over books alone``."""
    known = metric(name)
    if measure == "difference":
        words = f"{signed(found, known)} {known.unit}".rstrip()
    else:
        reduced = measure == "reduction"
        shares = percent or reduced
        digits = "{:.2f}" if measure == "slope" else f"{{:,.{known.digits}f}}"
        write = "{:.1%}" if shares else digits
        scale = 1 if shares or measure == "slope" else known.scale
        words = write.format((abs(found.value) if reduced else found.value) / scale)
        words += f" ± {write.format(found.half / scale)}" if found.half else ""
        words = f"slope {words}" if measure == "slope" else words
        words += (" less" if found.value >= 0 else " more") if reduced else ""
    if found.over and found.missing:
        words = f"{words} over {' and '.join(found.over)} alone"
    return words.replace("%", " %").replace("-", "−")


def signed(found: Estimate, known: Metric) -> str:
    """``−0.0245 ± 0.0029``."""
    text = f"{found.value / known.scale:+,.{known.digits}f}".replace("-", "−")
    return f"{text} ± {known.text(found.half)}" if found.half else text
