"""The page: what it shows, in real headless Chromium too, and the Markdown tables."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from maha_attn.cli import main
from maha_attn.experiments.definition import exhibits
from maha_attn.report.command import write_report
from maha_attn.report.page import Report, html, make_report, markdown

from .browser import browser, needs_chromium
from .conftest import Add, flops, language_model, write


def write_all(folder: Path) -> Path:
    """A result for every row of every exhibit; some with three seeds, one row not run."""
    for exhibit in exhibits().values():
        for part in exhibit.parts:
            for row in part.rows:
                if part.experiment in ("flops", "cost"):
                    write(folder, part.experiment, row, 0, **flops(lambda n: n**2))
                elif row != "nash":
                    for seed in range(1, 1 + (part.seeds or 3)):
                        bits = 2 + 0.01 * len(row) + 0.001 * seed
                        write(folder, part.experiment, row, seed, **language_model(bits))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_all(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(write_all(tmp_path_factory.mktemp("results")))


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
    assert mean["measured"] == "2.0420 ± 0.0100"  # 2 + 0.01·4 + 0.001·(1 + 2 + 3)/3
    assert (mean["seeds"], mean["spread"], mean["same conditions"]) == ("3", "0.0010", "no")
    assert mean["claimed bits per byte"] == "–"
    assert mean["perplexity"].endswith(" ± 0.50")
    assert rows["MAHA static"]["against MAHA mean"] == "+0.0200 ± 0.0000"
    assert "MAHA nash" not in rows
    assert "Not run yet: MAHA nash." in table.notes


def test_what_cannot_run_is_told_from_what_was_not_run(add: Add, tmp_path: Path) -> None:
    skipped = [None] * 6 + ["out of memory"] * 2
    add("cost", "materialised", 0, **flops(lambda n: n**2), skipped=skipped)
    text = markdown(make_report(tmp_path), tmp_path / "pictures")
    reason = "cannot run: out of memory (32,768, 65,536 tokens)."
    assert f"full attention, materialised {reason}" in text
    assert "Reformer (not causal, padding moves blocks, random)" in text.partition("Not run yet")[2]


def test_speeds_of_other_commits_and_fewer_seeds_are_marked(add: Add, tmp_path: Path) -> None:
    for row, commit in (("mean", "a" * 40), ("static", "a" * 40), ("gate", "b" * 40)):
        add("ablations", row, 1, **language_model(2.0), commit=commit)
        add("ablations", row, 2, **language_model(2.0, tokens_per_s=None), commit="c" * 40)
    (section,) = (s for s in make_report(tmp_path).sections if s.exhibit.name == "table2")
    (table,) = section.tables
    column = table.columns.index("training, 1000 tokens/s")
    assert [row[column] for row in table.rows] == ["100.0 (1)", "100.0 (1)", "100.0 † (1)"]
    assert "† measured at another commit than aaaaaaaaa." in table.notes


def test_times_are_of_the_device_that_timed_most_rows(add: Add, tmp_path: Path) -> None:
    rows = [
        *(("full", 1, "H100", 1e5), ("full", 2, "H200", 2e5), ("sliding", 1, "H200", 3e5)),
        *(("convex", 1, "H200", 4e5), ("nash", 1, "H100", 5e5), ("nash", 2, "H200", None)),
    ]
    for row, seed, device, speed in rows:
        add("books", row, seed, device=device, **language_model(1.5, tokens_per_s=speed))
    (section,) = (s for s in make_report(tmp_path).sections if s.exhibit.name == "table1")
    table = section.tables[0]
    speeds = [row[table.columns.index("training, 1000 tokens/s")] for row in table.rows]
    assert speeds == ["200.0 (1)", "300.0", "400.0", "–"]
    assert "Times are those on one device, H200." in table.notes


def test_that_training_diverged_is_told(add: Add, tmp_path: Path) -> None:
    add("ablations", "convex", 1, **language_model(2.0))
    add("ablations", "dense-conv", 1, metrics={"parameters": 5e7}, diverged=84, curves={})
    add("ablations", "dense-conv", 2, **language_model(2.0))
    (section,) = (s for s in make_report(tmp_path).sections if s.exhibit.name == "figure5")
    (table,) = section.tables
    (row,) = (row for row in table.rows if row[0] == "dense convolution")
    assert row[table.columns.index("seeds")] == "1 of 2"
    told = "Training of dense convolution diverged: no loss after step 84 (seed 1)."
    assert told in table.notes


def test_a_diverged_reference_leaves_the_others(results: Path, add: Add) -> None:
    add("books", "full", 1, metrics={"parameters": 5e7}, diverged=84, curves={})
    (section,) = (s for s in make_report(results).sections if s.exhibit.name == "table1")
    table = next(t for t in section.tables if "by position" in t.caption)
    assert table.rows[0][table.columns.index("MAHA convex")].startswith("+0.029")


def test_settings_of_every_row_are_there(report: Report) -> None:
    rows = {result.run[:3] for result in report.results}
    assert html(report).count("<pre>{") == len(rows) > 60


def test_differences_by_position_have_intervals(report: Report) -> None:
    (section,) = (s for s in report.sections if s.exhibit.name == "table1")
    table = next(t for t in section.tables if "by position" in t.caption)
    assert [row[0] for row in table.rows] == ["1", "2–3"]
    column = table.columns.index("MAHA convex")
    value, half = table.rows[0][column].split(" ± ")
    assert value == "+0.029"  # 0.02 nats longer is its name
    assert float(half) < 0.001  # the same in every book and seed
    assert table.notes == [
        "±: half the 95 % interval, over seeds and books. Below 0: better than full."
    ]


def test_old_files_have_no_share_of_weights_that_sum_to_more(add: Add, tmp_path: Path) -> None:
    for row, total in (("convex", 1.0), ("nash", 1.8)):
        content = language_model(2.0)
        del content["fusion"]["moved_untrained"]
        for layer in content["fusion"]["layers"]:
            layer["mean"] = [[total * w for w in head] for head in layer["mean"]]
        add("books", row, **content)
    (section,) = (s for s in make_report(tmp_path).sections if s.exhibit.name == "adaptivity")
    (table,) = section.tables
    assert [(row[0], row[2]) for row in table.rows] == [
        ("MAHA convex", "0.300"),
        ("MAHA nash", "–"),
    ]


def test_markdown_has_every_table_claim_and_figure(report: Report, tmp_path: Path) -> None:
    text = markdown(report, tmp_path / "pictures")
    for verdict in report.verdicts:
        assert verdict.claim.text in text
        if verdict.first:
            assert f"{verdict.claim.text}: {verdict.status}.** {verdict.sentence}" in text
    assert "| MAHA mean | – | 2.0420 ± 0.0100 | – | 3 | 0.0010 | no |" in text
    for section in report.sections:
        if section.panels:
            path = tmp_path / "pictures" / f"{section.exhibit.name}.png"
            assert f"](pictures/{path.name})" in text
            pixels = imread(path)
            assert pixels.std() > 0.05
            assert path.stat().st_size < 300_000


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
    assert "2.0000" in markdown(make_report(tmp_path), tmp_path)
    smoke = markdown(make_report(tmp_path, "smoke"), tmp_path)
    assert "3.0000" in smoke
    assert "2.0000" not in smoke


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    text = html(report)
    assert text.count("<script") - text.count('type="application/json"') == 2
    assert text.count("plotly.js v") == 1
    assert " src=" not in text.partition("<main>")[2].partition("</main>")[0]
    assert "<link rel=stylesheet" not in text


@needs_chromium
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
            if width == 1280:  # Every column of every table is in sight.
                hidden = "e => e.scrollWidth > e.clientWidth"
                assert (
                    tab.value(
                        f"[...document.querySelectorAll('.table .scroll')].filter({hidden}).length"
                    )
                    == 0
                )
        rows = "[...document.querySelectorAll('#table2 .table tbody tr')]"
        cells = f"{rows}.map(r => r.cells[2].innerText)"
        mean, static = "2.0420 ± 0.0100", "2.0620 ± 0.0100"
        assert tab.value(cells) == [mean, static, mean, static]
        click = "document.querySelectorAll('#table2 .table thead button')[2].click()"
        tab.value(click)
        assert tab.value(cells) == [mean, mean, static, static]
        tab.value(click)
        assert tab.value(cells)[0] == static
        assert tab.value("number('−1,000.5 ± 3')") == -1000.5  # as signs are written here
        assert tab.problems == []


@needs_chromium
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<div style='width:2000px'>x</div><script>nothing.here()</script>")
    with browser() as tab:
        tab.open(page, 400)
        assert tab.value("document.documentElement.scrollWidth") > 400
        assert any("nothing is not defined" in problem for problem in tab.problems)


def test_report_command(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in ("full", "convex"):
        add("books", row, **language_model(2.0))
    monkeypatch.chdir(tmp_path)
    main(["report", str(tmp_path), "--markdown", "docs/results.md"])
    printed = capsys.readouterr().out
    assert "NOT FULLY MEASURED" in printed
    assert Path("docs/results.md").read_text().startswith("# What was measured")
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    with pytest.raises(SystemExit):
        main(["report", "nowhere"])
    assert "there is no folder nowhere" in capsys.readouterr().err
