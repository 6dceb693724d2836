"""The report: a page that needs no network, and Markdown with pictures beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from maha_attn.experiments.definition import Exhibit, exhibits, experiments
from maha_attn.experiments.results import Result, distinct, read_results
from maha_attn.report.attention import attention_table
from maha_attn.report.figures import draw
from maha_attn.report.pictures import save_picture
from maha_attn.report.positions import position_table
from maha_attn.report.selection import Selected, select
from maha_attn.report.style import Panel
from maha_attn.report.tables import Table, claims_table, part_table
from maha_attn.report.verdicts import OUTCOMES, STATUSES, Verdict, judge

DRAWN_TABLES = {"by_position": position_table, "attention_maps": attention_table}
"""What a drawing shows, in numbers."""
LEGEND = (
    "Verdicts: *holds* or *does not hold* where the 95 % interval lies on one side of the claim's "
    "bound, *undecided* where it does not or where a source of variance is not recorded; *holds "
    "under a condition* where cases differ; *not fully measured* while a case has no run or fewer "
    "than three seeds, or some of its runs diverged.",
    "± after a difference is half the 95 % interval, by Student's t over training seeds and over "
    "the test part, added in quadrature; rows are compared on the same seeds and test part. After "
    "the value of one row it is the standard error over the held-out books, common to all rows for "
    "the most part. Spread: standard deviation over seeds. *Same conditions*: the paper's data and "
    "sizes, and the method as it prints it.",
    "Claimed –: the paper prints no number, or we do not know it. The accuracies in its tables and "
    "the baselines' memory are constants in a notebook of its published code.",
)
"""How to read the report."""


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

    @property
    def first_runs(self) -> list[Result]:
        """One of every row of every experiment and budget."""
        rows = {result.run[:3]: result for result in reversed(self.results)}
        return list(reversed(rows.values()))

    def distinct(self, name: str) -> list[str]:
        """The different values of a field over all results."""
        return distinct(self.results, name)


def make_report(folder: Path, budget: str | None = None) -> Report:
    """Read a folder of result files and lay them out.

    Args:
        folder: Of the result files.
        budget: Show the results of this budget only; None: of that with most rows of each table.
    """
    results, refused = read_results(folder)
    return Report([_section(e, results, budget) for e in exhibits().values()], results, refused)


def _section(exhibit: Exhibit, results: Sequence[Result], budget: str | None) -> Section:
    known = experiments()
    selected = [select(part, known[part.experiment], results, budget) for part in exhibit.parts]
    panels = draw(exhibit.drawing, selected, exhibit.options) if exhibit.drawing else []
    tables = [table for part in selected if (table := part_table(part))]
    more = DRAWN_TABLES.get(exhibit.drawing or "")
    if more and (table := more(selected)):
        tables.append(table)
    return Section(
        exhibit,
        selected,
        tables,
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
        outcomes=OUTCOMES,
        legend=[text.replace("*", "") for text in LEGEND],
        style=(source / "page.css").read_text(encoding="utf-8"),
        script=(source / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _figure_json(panel: Panel) -> str:
    """A figure as JSON that may stand in a script element."""
    return str(panel.figure.to_json()).replace("</", "<\\/")


def markdown(report: Report, pictures: Path) -> str:
    """The claims, every table, and every figure as a picture.

    Args:
        report: All of it.
        pictures: The folder of the pictures, which is beside the Markdown file. It is filled.
    """
    parts = [
        "# What was measured",
        "Written by `maha report` from the result files beside it; the page of the same name has "
        "the figures to point at.",
        claims_table(report.verdicts).markdown(),
        *LEGEND,
    ]
    for section in report.sections:
        exhibit = section.exhibit
        parts += [f"## {exhibit.paper or 'Our question'}: {exhibit.title}", exhibit.about.strip()]
        parts += [
            f"- **{v.claim.text}: {v.status}.** {v.sentence} {v.claim.caveat}".strip()
            for v in section.verdicts
            if v.first
        ]
        if section.panels:
            save_picture(section.panels, pictures / f"{exhibit.name}.png")
            parts.append(f"![{exhibit.title}]({pictures.name}/{exhibit.name}.png)")
        parts += [table.markdown() for table in section.tables]
    if report.refused:
        parts += ["## Refused", "\n".join(f"- {reason}" for reason in report.refused)]
    return "\n\n".join(parts) + "\n"
