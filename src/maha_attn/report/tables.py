"""Tables of the report: claimed beside measured, one row a line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from maha_attn.experiments.results import Result, distinct
from maha_attn.experiments.statistics import mean_and_spread
from maha_attn.report.metrics import metric, value
from maha_attn.report.selection import Selected
from maha_attn.report.verdicts import Verdict


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
    notes: list[str]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
        return "\n\n".join([f"**{self.caption}**", body, *self.notes])


def _escape(cell: str) -> str:
    return re.sub(r"([|*_])", r"\\\1", cell)


def part_table(selected: Selected) -> Table | None:
    """The rows of a part; None where it has no columns."""
    part, columns = selected.part, selected.part.columns
    if not columns:
        return None
    first, *others = columns
    conditions = selected.conditions
    differs = "–" if conditions is None else ("no" if conditions.differs else "yes")
    rows = []
    for name in part.rows:
        results = selected.rows.get(name, [])
        mean, seeds, spread = _statistics(results, first)
        claimed = part.claimed.get(name)
        rows.append(
            [
                selected.experiment.rows[name].label + _limits(results),
                metric(first).text(claimed),
                mean,
                seeds,
                spread,
                differs if results else "–",
                *(_cell(results, column, selected.one_device) for column in others),
            ]
        )
    return Table(
        selected.experiment.title,
        [
            "row",
            f"claimed {metric(first).label}",
            f"measured {metric(first).label}",
            *("seeds", "spread", "same conditions"),
            *(metric(column).label for column in others),
        ],
        rows,
        _notes(selected),
    )


def _limits(results: Sequence[Result]) -> str:
    """What the row's attention cannot do, in brackets."""
    limits = results[0].content.get("limits") if results else None
    return f" ({limits})" if limits else ""


def _statistics(results: Sequence[Result], column: str) -> tuple[str, str, str]:
    """Mean, number of seeds, and standard deviation over seeds."""
    values = [v for result in results if (v := value(result, column)) is not None]
    if not values:
        return "–", "–", "–"
    mean, spread = mean_and_spread(values)
    return metric(column).text(mean), str(len(values)), metric(column).text(spread)


def _cell(results: Sequence[Result], column: str, one_device: bool) -> str:
    if metric(column).by_device and not one_device:
        return "–"
    return _statistics(results, column)[0]


def _notes(selected: Selected) -> list[str]:
    """Budget, devices, what differs from the paper, why something is missing."""
    if selected.refused:
        return [f"Refused: {selected.refused}."]
    if not selected.rows:
        return ["Not run yet."]
    conditions = selected.conditions
    assert conditions is not None
    devices = ", ".join(distinct(selected.results, "device"))
    notes = [f"Budget {selected.budget}; {devices}."]
    if conditions.differs:
        notes.append(f"Not the paper's conditions: {conditions.differs}.")
    by_device = [c for c in selected.part.columns if metric(c).by_device]
    if by_device and not selected.one_device:
        notes.append("Times are left out: the rows ran on different devices.")
    return notes


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    """Every claim with its verdict."""
    rows = [
        [
            verdict.claim.text,
            verdict.claim.source,
            verdict.claim.claimed,
            verdict.measured,
            verdict.seeds,
            verdict.spread,
            {"": "yes", "–": "–"}.get(verdict.conditions, "no"),
            verdict.sentence,
        ]
        for verdict in verdicts
    ]
    columns = ["claim", "source", "claimed", "measured", "seeds", "spread", "same conditions"]
    return Table("Claims", [*columns, "verdict"], rows, [])
