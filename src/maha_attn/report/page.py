"""The report: one page that needs no network, and the same tables as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from maha_attn.experiments.definition import Exhibit, exhibits, experiments
from maha_attn.experiments.results import Result, distinct, read_results
from maha_attn.report.figures import Panel, draw
from maha_attn.report.selection import Selected, select
from maha_attn.report.tables import Table, claims_table, part_table
from maha_attn.report.verdicts import STATUSES, Verdict, judge


@dataclass(frozen=True)
class Section:
    """One exhibit as it is shown."""

    exhibit: Exhibit
    selected: list[Selected]
    tables: list[Table]
    panels: list[Panel]
    verdicts: list[Verdict]

    @property
    def results(self) -> list[Result]:
        """What it rests on."""
        return [result for part in self.selected for result in part.results]


@dataclass(frozen=True)
class Report:
    """All of it."""

    sections: list[Section]
    results: list[Result]
    refused: list[str]

    @property
    def verdicts(self) -> list[Verdict]:
        """Of every exhibit, those that were measured first."""
        found = [verdict for section in self.sections for verdict in section.verdicts]
        return sorted(found, key=lambda verdict: STATUSES.index(verdict.status))

    def distinct(self, name: str) -> list[str]:
        """The different values of a field over all results."""
        return distinct(self.results, name)


def make_report(folder: Path, budget: str | None = None) -> Report:
    """Read a folder of result files and lay them out.

    Args:
        folder: Of the result files.
        budget: Show the results of this budget only; None: of the largest that each table has.
    """
    results, refused = read_results(folder)
    return Report([_section(e, results, budget) for e in exhibits().values()], results, refused)


def _section(exhibit: Exhibit, results: Sequence[Result], budget: str | None) -> Section:
    known = experiments()
    selected = [select(part, known[part.experiment], results, budget) for part in exhibit.parts]
    panels = draw(exhibit.drawing, selected, exhibit.options) if exhibit.drawing else []
    return Section(
        exhibit,
        selected,
        [table for part in selected if (table := part_table(part))],
        panels,
        [judge(claim, selected, exhibit.name) for claim in exhibit.claims],
    )


def html(report: Report) -> str:
    """The page, with its styles, its script and plotly's."""
    environment = Environment(
        loader=PackageLoader("maha_attn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure_json
    environment.filters["slug"] = lambda status: status.replace(" ", "-")
    source = files("maha_attn.report") / "templates"
    return environment.get_template("page.html.j2").render(
        report=report,
        statuses=STATUSES,
        style=(source / "page.css").read_text(encoding="utf-8"),
        script=(source / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _figure_json(panel: Panel) -> str:
    """A figure as JSON that may stand in a script element."""
    return str(panel.figure.to_json()).replace("</", "<\\/")


def markdown(report: Report) -> str:
    """The claims and every table."""
    parts = [
        "# What was measured",
        "Written by `maha report`; the page of the same name has the figures.",
        claims_table(report.verdicts).markdown(),
    ]
    for section in report.sections:
        if section.tables:
            name = section.exhibit.paper or "Our question"
            parts += [f"## {name}: {section.exhibit.title}", section.exhibit.about.strip()]
            parts += [table.markdown() for table in section.tables]
    if report.refused:
        parts += ["## Refused", "\n".join(f"- {reason}" for reason in report.refused)]
    return "\n\n".join(parts) + "\n"
