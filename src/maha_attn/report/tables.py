"""Tables of the report: claimed beside measured, one row a line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from maha_attn.baselines.registry import ATTENTIONS
from maha_attn.experiments.results import Result, distinct
from maha_attn.experiments.statistics import mean_and_spread
from maha_attn.report.metrics import metric, value
from maha_attn.report.selection import Selected
from maha_attn.report.uncertainty import estimate
from maha_attn.report.verdicts import Verdict, signed

OTHER_COMMIT, IN_PART = "†", "‡"
"""Marks of cells."""


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Attributes:
        caption: What it shows.
        columns: Headings.
        rows: Cells, as many as there are columns.
        notes: What a reader must know.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
        parts = [f"**{self.caption}**", *([body] if self.rows else []), *self.notes]
        return "\n\n".join(parts)


def _escape(cell: str) -> str:
    return re.sub(r"([|*_])", r"\\\1", cell)


def part_table(selected: Selected) -> Table | None:
    """The rows of a part that were run; None where it has no columns."""
    part, columns = selected.part, selected.part.columns
    if not columns:
        return None
    first, *others = columns
    reference = selected.rows.get(part.reference or "")
    rows = []
    for name, results in selected.rows.items():
        values = selected.values(results, first)
        exact = metric(first).exact
        spread = "–" if len(values) < 2 else metric(first).text(mean_and_spread(values)[1])
        cells = [
            _label(selected, name),
            metric(first).text(part.claimed.get(name)),
            _cell(selected, results, first),
            *([_against(first, results, reference)] if part.reference else []),
            *(("–", "exact") if exact else (_seeds(results, len(values)), spread)),
            selected.printed(name),
        ]
        for column in others:
            seeds = len(selected.values(results, column))
            few = 0 < seeds < len(results)
            cells.append(_cell(selected, results, column) + (f" ({seeds})" if few else ""))
        rows.append(cells)
    than = [] if part.reference is None else selected.experiment.rows[part.reference].label
    columns = [
        "row",
        f"claimed {metric(first).label}",
        "measured",
        *([f"against {than}"] if than else []),
        *("seeds", "spread", "same conditions"),
        *(metric(column).label for column in others),
    ]
    return Table(selected.experiment.title, columns, rows, _notes(selected, rows))


def _seeds(results: Sequence[Result], having: int) -> str:
    """How many have the number, and of how many where others diverged."""
    diverged = any(result.diverged is not None for result in results)
    return f"{having} of {len(results)}" if diverged else str(having or "–")


def _label(selected: Selected, name: str) -> str:
    """A row's name and, in brackets, what its attention cannot do."""
    row = selected.experiment.rows[name]
    limits = ATTENTIONS[row.kind].properties()
    return f"{row.label} ({limits})" if limits else row.label


def _cell(selected: Selected, results: Sequence[Result], column: str) -> str:
    """The mean over seeds, with its error over the test part where there is one."""
    known, results = metric(column), selected.with_value(results, column)
    if not results:
        return "–"
    text = known.text(mean_and_spread(selected.values(results, column))[0])
    errors = [e for r in results if known.error and (e := value(r, known.error)) is not None]
    if errors:
        text = f"{text} ± {known.text(mean_and_spread(errors)[0])}"
    if known.by_device and {r["commit"] for r in results} != {selected.commit}:
        text = f"{text} {OTHER_COMMIT}"
    return text


def _against(column: str, results: Sequence[Result], reference: list[Result] | None) -> str:
    """The difference from the reference with its 95 % interval."""
    if reference is None or results is reference:
        return "–"
    found = estimate("difference", column, results, reference)
    if found is None:
        return "–"
    text = signed(found, metric(column))
    return f"{text} {IN_PART}" if found.missing else text


def _lacking(selected: Selected) -> str:
    """The sources of variance that the differences from the reference leave out."""
    column, reference = selected.part.columns[0], selected.rows[selected.part.reference or ""]
    others = [results for results in selected.rows.values() if results is not reference]
    found = [estimate("difference", column, results, reference) for results in others]
    return ", ".join(dict.fromkeys(source for e in found if e for source in e.missing))


def _notes(selected: Selected, rows: list[list[str]]) -> list[str]:
    """Budget, devices, what differs from the paper, why something is missing."""
    part, experiment = selected.part, selected.experiment
    if selected.refused:
        return [f"Refused: {selected.refused}."]
    missing = [_label(selected, name) for name in part.rows if name not in selected.rows]
    if not selected.rows:
        return [f"Not run yet: {'; '.join(missing)}."]
    conditions = selected.conditions
    assert conditions is not None
    counted = experiment.kind == "flops"
    where = "counted on shapes, the same on every device" if counted else ""
    where = where or ", ".join(distinct(selected.results, "device"))
    notes = [f"Budget {selected.budget}; {where}."]
    if conditions.differs:
        notes.append(f"Not the paper's conditions: {conditions.differs}.")
    if experiment.pretrained:
        notes.append("Every row starts from one pretrained model: seeds are those of fine-tuning.")
    cells = [cell for row in rows for cell in row[1:]]
    if any(OTHER_COMMIT in cell for cell in cells):
        notes.append(f"{OTHER_COMMIT} measured at another commit than {selected.commit[:9]}.")
    if any(IN_PART in cell for cell in cells):
        notes.append(f"{IN_PART} The interval lacks a source of variance: {_lacking(selected)}.")
    if any(cell.endswith(")") for cell in cells):
        notes.append("(n): over n seeds alone: of others the number was not recorded.")
    if part.reference in selected.rows and _lacks_pairs(selected):
        notes.append("Differences are means over the seeds that both rows have.")
    if selected.timed and len(distinct(selected.results, "device")) > 1:
        notes.append(f"Times are those on one device, {selected.timed[0]['device']}.")
    notes += [line for name in selected.rows if (line := _cannot(selected, name))]
    notes += [line for name in selected.rows if (line := _diverged(selected, name))]
    notes += _causality(selected)
    if missing:
        notes.append(f"Not run yet: {'; '.join(missing)}.")
    return notes


def _lacks_pairs(selected: Selected) -> bool:
    """Whether some row has other seeds than the reference."""
    column = selected.part.columns[0]
    seeds = [
        {r["seed"] for r in selected.with_value(row, column)} for row in selected.rows.values()
    ]
    return any(own != seeds[0] for own in seeds)


def _diverged(selected: Selected, name: str) -> str:
    """Which seeds of a row ended without a loss."""
    ended = [
        f"step {step} (seed {result['seed']})"
        for result in selected.rows[name]
        if (step := result.diverged) is not None
    ]
    label = selected.experiment.rows[name].label
    return f"Training of {label} diverged: no loss after {', '.join(ended)}." if ended else ""


def _causality(selected: Selected) -> list[str]:
    """Of which trained language models it was checked that they do not look ahead."""
    checked: dict[bool, list[str]] = {True: [], False: []}
    for name, results in selected.rows.items():
        if scored := selected.with_value(results, "bits_per_byte"):
            label = selected.experiment.rows[name].label
            checked[all(r["metrics"].get("causal") for r in scored)].append(label)
    words = {
        True: "No prediction of the trained models changes with a later token",
        False: "Not checked on these trained models that none changes with a later token",
    }
    return [f"{words[known]}: {', '.join(rows)}." for known, rows in checked.items() if rows]


def _cannot(selected: Selected, name: str) -> str:
    """At which lengths a row of a benchmark has no value, and why."""
    result = selected.rows[name][0]
    lengths = result.content.get("curves", {}).get("length", [])
    reasons: dict[str, list[str]] = {}
    for length, reason in zip(lengths, result.content.get("skipped") or [], strict=False):
        if reason:
            reasons.setdefault(str(reason), []).append(f"{length:,}")
    label = selected.experiment.rows[name].label
    found = "; ".join(f"{reason} ({', '.join(at)} tokens)" for reason, at in reasons.items())
    return f"{label} cannot run: {found}." if found else ""


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    """Every claim of which something was measured, and the others' names."""
    rows = [
        [
            verdict.claim.text,
            f"{verdict.claim.claimed} ({verdict.claim.source})",
            verdict.status,
            f"{first.text} ({first.case.condition})",
            first.seeds,
            first.conditions,
        ]
        for verdict in verdicts
        if (first := verdict.first)
    ]
    columns = ["claim", "claimed", "verdict", "measured, first case", "seeds", "same conditions"]
    missing = [verdict.claim.text for verdict in verdicts if not verdict.first]
    notes = [f"Not measured: {'; '.join(missing)}."] if missing else []
    return Table("Claims", columns, rows, notes)
