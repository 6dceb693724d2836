"""Claims against made-up results: every verdict, and its sentence."""

from pathlib import Path

import pytest

from maha_attn.experiments.definition import Case, Claim, Part, experiments
from maha_attn.experiments.results import read_results
from maha_attn.report.selection import Selected, select
from maha_attn.report.verdicts import judge

from .conftest import Add, flops, language_model

CASES = [
    Case(row="convex", than="mean", condition="with convex fusion"),
    Case(row="nash", than="mean", condition="with Nash fusion"),
]
BETTER = Claim(
    text="better", source="s", measure="difference", metric="bits_per_byte", at_most=0, cases=CASES
)


def selected(folder: Path, experiment: str, *rows: str) -> list[Selected]:
    results, refused = read_results(folder)
    assert not refused
    part = Part(experiment=experiment, rows=list(rows), columns=["bits_per_byte"])
    return [select(part, experiments()[experiment], results)]


@pytest.mark.parametrize(
    ("convex", "nash", "status", "sentence"),
    [
        (
            1.8,
            1.9,
            "holds",
            "Holds with convex fusion (−0.2000 ± 0.0000 bits per byte, one seed); "
            "with Nash fusion (−0.1000 ± 0.0000 bits per byte, one seed).",
        ),
        (
            *(1.8, 2.1, "holds under a condition"),
            "Holds with convex fusion (−0.2000 ± 0.0000 bits per byte, one seed). "
            "Does not hold with Nash fusion (+0.1000 ± 0.0000 bits per byte, one seed).",
        ),
        (
            *(2.2, None, "does not hold"),
            "Does not hold with convex fusion (+0.2000 ± 0.0000 bits per byte, one seed). "
            "Not measured with Nash fusion.",
        ),
    ],
)
def test_difference(
    add: Add, tmp_path: Path, convex: float, nash: float | None, status: str, sentence: str
) -> None:
    for row, bits in (("mean", 2.0), ("convex", convex), ("nash", nash)):
        if bits is not None:
            add("ablations", row, **language_model(bits))
    verdict = judge(BETTER, selected(tmp_path, "ablations", "mean", "convex", "nash"), "e")
    assert (verdict.status, verdict.sentence) == (status, sentence)
    assert verdict.conditions  # the small budget is not the paper's
    assert verdict.seeds == "1"


def test_within_the_error_nothing_is_decided(add: Add, tmp_path: Path) -> None:
    for seed, bits in ((1, 1.9), (2, 2.08)):
        add("ablations", "mean", seed, **language_model(2.0))
        add("ablations", "convex", seed, **language_model(bits))
    verdict = judge(BETTER, selected(tmp_path, "ablations", "mean", "convex"), "e")
    assert verdict.status == "undecided"
    assert verdict.sentence.startswith(
        "Within the error with convex fusion (−0.0100 ± 0.0900 bits per byte)."
    )
    assert (verdict.measured, verdict.seeds, verdict.spread) == ("−0.0100", "2", "0.0900")


def test_a_smoke_test_decides_nothing(add: Add, tmp_path: Path) -> None:
    for row in ("mean", "convex"):
        add("ablations", row, budget="smoke", **language_model(2.0))
    verdict = judge(BETTER, selected(tmp_path, "ablations", "mean", "convex"), "e")
    assert verdict.status == "not measured"
    assert "only a smoke test" in verdict.sentence
    empty = judge(BETTER, selected(tmp_path, "books", "convex"), "e")
    assert "no run of it" in empty.sentence


def test_reduction_and_slope(add: Add, tmp_path: Path) -> None:
    add("flops", "full", 0, **flops(lambda n: n**2))
    add("flops", "linear", 0, **flops(lambda n: 400 * n))
    add("flops", "paper", 0, **flops(lambda n: 1.25 * n**2))
    parts = selected(tmp_path, "flops", "full", "linear", "paper")
    fewer = Claim(
        **{"text": "fewer", "source": "s", "claimed": "81 %", "measure": "reduction"},
        **{"metric": "attention_flops", "at": 4096, "at_least": 0.81, "percent": True},
        cases=[
            Case(row="linear", than="full", condition="with windows"),
            Case(row="paper", than="full", condition="without"),
        ],
    )
    verdict = judge(fewer, parts, "e")
    assert verdict.status == "holds under a condition"
    assert verdict.sentence == (
        "Holds with windows (90.2 % less). Does not hold without (25.0 % more)."
    )
    assert (verdict.measured, verdict.spread, verdict.conditions) == ("90.2 %", "exact", "")
    linear = Claim(
        **{"text": "linear", "source": "s", "measure": "slope", "metric": "attention_flops"},
        **{"between": [8192, 65536], "at_most": 1.25},
        cases=[
            Case(row="linear", condition="with windows"),
            Case(row="paper", condition="without"),
        ],
    )
    found = judge(linear, parts, "e").sentence
    assert found == "Holds with windows (slope 1.00). Does not hold without (slope 2.00)."


def test_times_are_compared_on_one_device_only(add: Add, tmp_path: Path) -> None:
    faster = Claim(
        **{"text": "faster", "source": "s", "measure": "reduction", "metric": "tokens_per_s"},
        at_most=0,
        cases=[CASES[0]],
    )
    add("ablations", "mean", **language_model(2.0, tokens_per_s=1e5))
    add("ablations", "convex", **language_model(2.0, tokens_per_s=2e5))
    parts = selected(tmp_path, "ablations", "mean", "convex")
    assert judge(faster, parts, "e").status == "holds"
    add("ablations", "convex", **language_model(2.0, tokens_per_s=2e5), device="another GPU")
    parts = selected(tmp_path, "ablations", "mean", "convex")
    assert judge(faster, parts, "e").status == "not measured"
