"""A claim against what was measured: one verdict and one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from maha_attn.experiments.definition import Case, Claim
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
Outcome = Literal["holds", "fails", "open", "one seed", "control", "missing"]
OUTCOMES: dict[Outcome, str] = {
    "holds": "holds",
    "fails": "does not hold",
    "open": "undecided",
    "one seed": "one seed:",
    "control": "beside it:",
    "missing": "not measured:",
}


@dataclass(frozen=True)
class Finding:
    """A case of a claim and what was measured for it.

    Attributes:
        case: The case.
        outcome: ``open``: its 95 % interval holds the claim's bound, or a source of variance is
            unknown; ``one seed``: training was not repeated, so nothing is decided.
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
            in others; ``not fully measured`` while a case is missing or has one seed.
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
        smoke = any(part.rows and not part.counts for part in selected)
        why = "only a smoke test was run." if smoke else "no run of it is in the results."
        return Verdict(claim, exhibit, "not measured", f"Not measured: {why}", findings)
    if outcomes & {"missing", "one seed"}:
        status = "not fully measured"
    elif {"holds", "fails"} <= outcomes:
        status = "holds under a condition"
    elif "fails" in outcomes:
        status = "does not hold"
    else:
        status = "undecided" if "open" in outcomes else "holds"
    return Verdict(claim, exhibit, status, _sentence(findings), findings)


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
        if found is not None:
            text = describe(claim.measure, claim.metric, found, claim.percent)
            seeds = "–" if metric(column).exact else str(found.seeds)
            outcome = "control" if case.control else _outcome(claim, found)
            return Finding(case, outcome, text, seeds, part.printed(case.row))
    return Finding(case, "missing")


def _outcome(claim: Claim, found: Estimate) -> Outcome:
    if "seeds" in found.missing:
        return "one seed"
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
