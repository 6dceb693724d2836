"""``maha report``."""

import argparse
from collections.abc import Collection
from pathlib import Path

from maha_attn.experiments.definition import BUDGETS
from maha_attn.experiments.results import FOLDER
from maha_attn.report.page import Report, html, make_report, markdown

HELP = """\
Turn the result files of `maha reproduce` into one page with tables and figures, which needs no
network, and into Markdown with pictures in a folder beside it. Nothing is run. Files that do not
say how they came about are refused, and so are tables whose rows are not comparable; the page says
which and why.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: The folder of results does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="maha report",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="?", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument(
        "--budget", choices=BUDGETS, help="default: the one that has most rows of a table"
    )
    parser.add_argument("--html", type=Path, help="the page; default: report.html in the folder")
    parser.add_argument("--markdown", type=Path, help="default: report.md in the folder")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}; `maha report --help` lists them")
    if not parsed.results.is_dir():
        raise ValueError(
            f"there is no folder {parsed.results}; `maha reproduce figure3 --device cpu` makes it"
        )
    return parsed


def write_report(
    results: Path, budget: str | None = None, page: Path | None = None, tables: Path | None = None
) -> tuple[Report, list[Path]]:
    """Write the page and the Markdown; returns what they show and where they are."""
    report = make_report(results, budget)
    page, tables = page or results / "report.html", tables or results / "report.md"
    for path in (page, tables):
        path.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html(report), encoding="utf-8")
    tables.write_text(markdown(report, tables.with_suffix("")), encoding="utf-8")
    return report, [page, tables]


def summary(report: Report, written: list[Path], exhibits: Collection[str] | None = None) -> str:
    """For the terminal: claims with their verdicts, what was refused, where the files are.

    ``exhibits``: only claims of these.
    """
    verdicts = [v for v in report.verdicts if exhibits is None or v.exhibit in exhibits]
    lines = [f"{v.status.upper():<24}{v.claim.text}" for v in verdicts]
    lines += [f"REFUSED                 {reason}" for reason in report.refused]
    refused = [p.refused for section in report.sections for p in section.selected if p.refused]
    lines += [f"REFUSED                 {reason}" for reason in dict.fromkeys(refused)]
    return "\n".join([*lines, f"Report: {written[0]}; tables: {written[1]}"])
