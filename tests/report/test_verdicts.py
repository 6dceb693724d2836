"""Claims against made-up results: every verdict, and its sentence."""

from pathlib import Path
from typing import Any

import pytest

from maha_attn.experiments.definition import Case, Claim, Part, experiments
from maha_attn.experiments.results import read_results
from maha_attn.report.selection import Selected, select
from maha_attn.report.verdicts import Verdict, judge

from .conftest import Add, flops, language_model

CASES = [
    Case(row="convex", than="mean", condition="with convex fusion"),
    Case(row="nash", than="mean", condition="with Nash fusion"),
]
BETTER = Claim(
    text="better", source="s", measure="difference", metric="bits_per_byte", at_most=0, cases=CASES
)
ROWS = ("mean", "convex", "nash")


def selected(folder: Path, experiment: str, *rows: str) -> list[Selected]:
    results, refused = read_results(folder)
    assert not refused
    part = Part(experiment=experiment, rows=list(rows), columns=["bits_per_byte"])
    return [select(part, experiments()[experiment], results)]


def verdict_on(
    add: Add, folder: Path, convex: list[float], nash: list[float], claim: Claim = BETTER
) -> Verdict:
    """The verdict on bits per byte by seed, beside 2 bits of ``mean``."""
    for row, values in (("mean", [2.0] * 3), ("convex", convex), ("nash", nash)):
        for seed, bits in enumerate(values, start=1):
            add("ablations", row, seed, **language_model(bits))
    return judge(claim, selected(folder, "ablations", *ROWS), "e")


BETTER_3, WORSE_3, OPEN_3 = [1.79, 1.8, 1.81], [2.09, 2.1, 2.11], [1.8, 1.9, 2.2]


@pytest.mark.parametrize(
    ("convex", "nash", "status", "sentence"),
    [
        (
            *(BETTER_3, BETTER_3, "holds"),
            "Holds with convex fusion (−0.2000 ± 0.0248 bits per byte); "
            "with Nash fusion (−0.2000 ± 0.0248 bits per byte).",
        ),
        (
            *(BETTER_3, WORSE_3, "holds under a condition"),
            "Holds with convex fusion (−0.2000 ± 0.0248 bits per byte). "
            "Does not hold with Nash fusion (+0.1000 ± 0.0248 bits per byte).",
        ),
        (
            *(WORSE_3, OPEN_3, "does not hold"),
            "Does not hold with convex fusion (+0.1000 ± 0.0248 bits per byte). "
            "Undecided with Nash fusion (−0.0333 ± 0.5171 bits per byte).",
        ),
        (
            *(BETTER_3, OPEN_3, "undecided"),
            "Holds with convex fusion (−0.2000 ± 0.0248 bits per byte). "
            "Undecided with Nash fusion (−0.0333 ± 0.5171 bits per byte).",
        ),
        (
            *(BETTER_3, [], "not fully measured"),
            "Holds with convex fusion (−0.2000 ± 0.0248 bits per byte). "
            "Not measured: with Nash fusion.",
        ),
        (
            *(BETTER_3, [1.0], "not fully measured"),
            "Holds with convex fusion (−0.2000 ± 0.0248 bits per byte). Fewer than three seeds: "
            "with Nash fusion (−1.0000 ± 0.0000 bits per byte over books alone).",
        ),
    ],
)
def test_difference(
    add: Add,
    tmp_path: Path,
    convex: list[float],
    nash: list[float],
    status: str,
    sentence: str,
) -> None:
    verdict = verdict_on(add, tmp_path, convex, nash)
    assert verdict.status == status
    assert verdict.sentence == sentence
    assert verdict.first is not None
    assert verdict.first.conditions == "no"  # the small budget is not the paper's


def test_two_seeds_decide_nothing(add: Add, tmp_path: Path) -> None:
    verdict = verdict_on(add, tmp_path, [1.7, 1.7], [1.7, 1.72])
    assert verdict.status == "not fully measured"
    assert verdict.sentence.startswith("Fewer than three seeds: with convex fusion (−0.3000")


def test_survivors_of_divergence_decide_nothing(add: Add, tmp_path: Path) -> None:
    verdict_on(add, tmp_path, BETTER_3, [])
    add("ablations", "convex", 2, metrics={"parameters": 5e7}, diverged=9, curves={})
    for seed in (1, 2, 3):
        add("ablations", "nash", seed, metrics={"parameters": 5e7}, diverged=9, curves={})
    verdict = judge(BETTER, selected(tmp_path, "ablations", *ROWS), "e")
    assert verdict.status == "not fully measured"
    assert verdict.sentence == (
        "Training diverged: with convex fusion (−0.2000 ± 0.1271 bits per byte; 1 of 3 seeds "
        "diverged); with Nash fusion (3 of 3 seeds diverged)."
    )


def test_a_control_decides_nothing(add: Add, tmp_path: Path) -> None:
    controls = [CASES[0], Case(row="nash", than="mean", condition="nash", control=True)]
    claim = Claim(
        **{"text": "t", "source": "s", "metric": "bits_per_byte"},
        measure="difference",
        at_most=0,
        cases=controls,
    )
    verdict = verdict_on(add, tmp_path, BETTER_3, WORSE_3, claim)
    assert verdict.status == "holds"
    assert verdict.sentence.endswith("Beside it: nash (+0.1000 ± 0.0248 bits per byte).")


def test_a_smoke_test_decides_nothing(add: Add, tmp_path: Path) -> None:
    for row in ("mean", "convex"):
        add("ablations", row, budget="smoke", **language_model(2.0))
    verdict = judge(BETTER, selected(tmp_path, "ablations", "mean", "convex"), "e")
    assert verdict.status == "not measured"
    assert "only a smoke test" in verdict.sentence
    empty = judge(BETTER, selected(tmp_path, "books", "convex"), "e")
    assert "no run of it" in empty.sentence
    add("ablations", "mean", **language_model(2.0))
    add("ablations", "convex", **language_model(2.0), device_class="cpu")
    refused = judge(BETTER, selected(tmp_path, "ablations", "mean", "convex"), "e")
    assert refused.sentence == "Not measured: its results may not stand in one table."


def accuracy_verdict(add: Add, folder: Path, **content: Any) -> Verdict:
    """The verdict on 75 % against 70 % of 400 sentences, three seeds."""
    for row, number, errors in (("maha", 75.0, 100), ("full", 70.0, 120)):
        given = {"correct": "1" * (400 - errors) + "0" * errors} | content
        for seed in (1, 2, 3):
            document = language_model(2.0, accuracy=number) | given
            add("sst2", row, seed, **{k: v for k, v in document.items() if v is not None})
    claim = Claim(
        **{"text": "t", "source": "s", "metric": "accuracy"},
        measure="difference",
        at_least=-0.2,
        cases=[Case(row="maha", than="full", condition="on SST-2")],
    )
    return judge(claim, selected(folder, "sst2", "maha", "full"), "e")


def test_test_sentences_are_a_sample_too(add: Add, tmp_path: Path) -> None:
    paired = accuracy_verdict(add, tmp_path)
    assert paired.status == "holds"
    assert "(+5.00 ± 2.15 points)" in paired.sentence
    unpaired = accuracy_verdict(add, tmp_path, correct=None)
    assert unpaired.status == "undecided"
    assert "(+5.00 ± 6.20 points)" in unpaired.sentence


def test_reduction_and_slope(add: Add, tmp_path: Path) -> None:
    add("flops", "full", 0, **flops(lambda n: n**2))
    add("flops", "linear", 0, **flops(lambda n: 400 * n))
    add("flops", "paper", 0, **flops(lambda n: 1.25 * n**2))
    parts = selected(tmp_path, "flops", "full", "linear", "paper")
    fewer = Claim(
        **{"text": "fewer", "source": "s", "claimed": "81 %", "metric": "attention_flops"},
        measure="reduction",
        at=4096,
        at_least=0.81,
        percent=True,
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
    # Windows are not what the paper prints; its every scale is full.
    assert [f.conditions for f in verdict.findings] == ["no", "yes"]
    assert [f.seeds for f in verdict.findings] == ["–", "–"]
    linear = Claim(
        **{"text": "linear", "source": "s", "metric": "attention_flops"},
        measure="slope",
        between=[8192, 65536],
        at_most=1.25,
        cases=[
            Case(row="linear", condition="with windows"),
            Case(row="paper", condition="without"),
        ],
    )
    found = judge(linear, parts, "e").sentence
    assert found == "Holds with windows (slope 1.00). Does not hold without (slope 2.00)."


def test_tables_of_unequal_size_or_of_the_future_are_refused(add: Add, tmp_path: Path) -> None:
    add("ablations", "convex", **language_model(2.0))
    path = add("ablations", "mean", **language_model(2.0, parameters=5.2e7))
    (part,) = selected(tmp_path, "ablations", *ROWS)
    assert "in parameters" in part.refused
    assert str(path) in part.refused
    add("ablations", "mean", **language_model(2.0, parameters=5.05e7, causal=False))
    (part,) = selected(tmp_path, "ablations", *ROWS)
    assert part.refused == f"{path}: a prediction changes with a later token"
    add("ablations", "mean", **language_model(2.0, parameters=5.05e7))
    (part,) = selected(tmp_path, "ablations", *ROWS)
    assert not part.refused
