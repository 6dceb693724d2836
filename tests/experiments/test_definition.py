"""The experiments and exhibits that the package has, and what is refused."""

from pathlib import Path

import pytest
import yaml

from maha_attn.experiments import definition
from maha_attn.experiments.definition import BUDGETS, Claim, exhibits, experiments
from maha_attn.report.figures import DRAWINGS
from maha_attn.report.metrics import metric


def test_everything_that_exhibits_name_exists() -> None:
    """Rows and experiments are checked on reading."""
    for exhibit in exhibits().values():
        assert exhibit.drawing is None or exhibit.drawing in DRAWINGS
        for part in exhibit.parts:
            for column in part.columns:
                metric(column)
            grouped = {row for group in part.groups.values() for row in group}
            assert set(part.claimed) | grouped <= set(part.rows)
        for claim in exhibit.claims:
            metric(claim.metric)


def test_the_paper_is_covered() -> None:
    names = [*("table1", "table2"), *(f"figure{i}" for i in range(2, 7)), *("adaptivity", "cost")]
    assert list(exhibits()) == names
    assert all(list(known.budgets) == list(BUDGETS) for known in experiments().values())


def test_settings_add_up_from_the_experiment_to_the_row() -> None:
    flops = experiments()["flops"]
    assert flops.merged("linear-fine", "small")["queries"] == "fine"
    assert flops.merged("linear-fine", "small")["hidden_size"] == 768
    books = experiments()["books"]
    assert books.merged("gate", "smoke")["model.fusion"] == "gate"
    assert books.merged("gate", "smoke")["train.max_steps"] == 6
    assert "model.window" not in books.merged("gate", "small")


EXPERIMENT = {"title": "t", "kind": "flops", "budgets": {"small": {"seeds": [1]}}, "rows": {}}
PART = {"experiment": "books", "rows": ["full"]}
CASE = {"row": "full", "condition": "c"}
CLAIM = {"text": "x", "source": "s", "measure": "value", "metric": "m", "cases": [CASE]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**EXPERIMENT, "row": {}}, "row unknown; expected budgets, explained, kind"),
        ({"title": "t"}, "kind, budgets, rows missing"),
        ({**EXPERIMENT, "budgets": {"tiny": {"seeds": [1]}}}, "budgets are smoke, small, paper"),
        ({**EXPERIMENT, "rows": {"a": {"lable": "A"}}}, "rows, a: lable unknown"),
        ({**EXPERIMENT, "match_parameters": "b"}, "match_parameters names no row: 'b'"),
        ({**EXPERIMENT, "printed": ["b"]}, "printed names no row: b"),
        ([], "expected a mapping, got list"),
    ],
)
def test_bad_experiment(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as refused:
        definition._experiment(path)
    assert "bad.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [{**PART, "rows": ["fool"]}]}, "no row 'fool' of experiment 'books'"),
        ({"parts": [{**PART, "experiment": "book"}]}, "of experiment 'book'"),
        ({"claims": [CLAIM]}, "exactly one of at_least and at_most"),
        ({"claims": [{**CLAIM, "at_most": 1, "measure": "ratio"}]}, "must be one of value"),
        ({"claims": [{**CLAIM, "at_most": 1, "measure": "difference"}]}, "`than`"),
    ],
)
def test_bad_exhibit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"title": "t", "about": "a", "parts": [PART], **change}))
    with pytest.raises(ValueError, match=message):
        definition._exhibit(path, experiments())


def test_claims_of_the_paper_say_where_they_stand() -> None:
    claims: list[Claim] = [claim for exhibit in exhibits().values() for claim in exhibit.claims]
    assert len(claims) >= 9
    assert all(claim.source and claim.cases for claim in claims)
