"""The page: what it shows, in real headless Chromium too, and the Markdown tables."""

import json
from pathlib import Path

import pytest

from maha_attn.cli import main
from maha_attn.experiments.definition import exhibits
from maha_attn.report.command import write_report
from maha_attn.report.page import Report, html, make_report, markdown

from .browser import CHROMIUM, browser
from .conftest import Add, flops, language_model


@pytest.fixture
def results(add: Add, tmp_path: Path) -> Path:
    """A result for every row of every exhibit; some with three seeds, one row not run."""
    for exhibit in exhibits().values():
        for part in exhibit.parts:
            for row in part.rows:
                if part.experiment in ("flops", "cost"):
                    add(part.experiment, row, 0, **flops(lambda n: n**2))
                elif row != "nash":
                    for seed in range(1, 1 + (part.seeds or 1)):
                        bits = 2 + 0.01 * len(row) + 0.001 * seed
                        add(part.experiment, row, seed, **language_model(bits))
    return tmp_path


@pytest.fixture
def report(results: Path) -> Report:
    return make_report(results)


def test_every_exhibit_is_drawn(report: Report) -> None:
    for section in report.sections:
        assert section.panels or section.exhibit.drawing is None, section.exhibit.name
        for panel in section.panels:
            assert panel.figure.data
    assert len({verdict.claim.text for verdict in report.verdicts}) == len(report.verdicts)


def test_tables_have_the_numbers(report: Report) -> None:
    (section,) = (s for s in report.sections if s.exhibit.name == "table2")
    (table,) = section.tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    mean = rows["MAHA mean"]
    assert mean["measured bits per byte"] == "2.0420"  # 2 + 0.01·4 + 0.001·(1 + 2 + 3)/3
    assert (mean["seeds"], mean["spread"], mean["same conditions"]) == ("3", "0.0010", "no")
    assert mean["claimed bits per byte"] == "–"
    assert set(list(rows["MAHA nash"].values())[1:]) == {"–"}


def test_markdown_has_every_table_and_claim(report: Report) -> None:
    text = markdown(report)
    for verdict in report.verdicts:
        assert verdict.sentence.replace("_", "\\_") in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 50
    assert "| MAHA mean | – | 2.0420 | 3 | 0.0010 | no |" in text


def test_refusals_are_shown(results: Path, add: Add) -> None:
    bad = add("ablations", "convex", 1, **language_model(2.0), device_class="cpu")
    worse = results / "flops" / "small" / "full-seed0.json"
    content = json.loads(worse.read_text())
    del content["commit"]
    worse.write_text(json.dumps(content))
    report = make_report(results)
    assert report.refused == [f"{worse}: lacks commit"]
    text = html(report)
    assert f"{worse}: lacks commit" in text
    assert f"rows of one table differ in device_class: cpu in {bad}" in text
    (section,) = (s for s in report.sections if s.exhibit.name == "table2")
    assert not section.results
    assert {v.status for v in section.verdicts} == {"not measured"}


def test_the_largest_budget_is_shown_unless_told_otherwise(add: Add, tmp_path: Path) -> None:
    for budget, bits in (("smoke", 3.0), ("small", 2.0)):
        add("ablations", "mean", budget=budget, **language_model(bits))
    assert "2.0000" in markdown(make_report(tmp_path))
    smoke = markdown(make_report(tmp_path, "smoke"))
    assert "3.0000" in smoke
    assert "2.0000" not in smoke


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    text = html(report)
    assert text.count("<script") - text.count('type="application/json"') == 2
    assert text.count("plotly.js v") == 1
    assert " src=" not in text.partition("<main>")[2].partition("</main>")[0]
    assert "<link rel=stylesheet" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_in_a_browser(results: Path) -> None:
    _, (page, _) = write_report(results)
    with browser() as tab:
        for width in (1280, 400):
            tab.open(page, width)
            assert tab.value("document.documentElement.scrollWidth") == width
            assert tab.value("document.querySelectorAll('.plot .main-svg').length") > 20
            boxes = (
                "[...document.querySelectorAll('section, .plot, .panel, .scroll, .claim')]"
                ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
            )
            assert tab.value(boxes) == 0
        rows = "[...document.querySelectorAll('#table2 .table tbody tr')]"
        cells = f"{rows}.map(r => r.cells[2].innerText)"
        assert tab.value(cells) == ["2.0420", "2.0620", "2.0420", "2.0620", "–"]
        click = "document.querySelectorAll('#table2 .table thead button')[2].click()"
        tab.value(click)
        assert tab.value(cells) == ["2.0420", "2.0420", "2.0620", "2.0620", "–"]
        tab.value(click)
        assert tab.value(cells)[0] == "2.0620"
        assert tab.problems == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<div style='width:2000px'>x</div><script>nothing.here()</script>")
    with browser() as tab:
        tab.open(page, 400)
        assert tab.value("document.documentElement.scrollWidth") > 400
        assert any("nothing is not defined" in problem for problem in tab.problems)


def test_report_command(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results)
    main(["report", str(results), "--markdown", "docs/results.md"])
    printed = capsys.readouterr().out
    assert "HOLDS" in printed
    assert Path("docs/results.md").read_text().startswith("# What was measured")
    assert (results / "report.html").stat().st_size > 1_000_000
    with pytest.raises(SystemExit):
        main(["report", "nowhere"])
    assert "there is no folder nowhere" in capsys.readouterr().err
