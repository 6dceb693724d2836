"""What rows of one table must share, and what tells a result from one of another recipe."""

from pathlib import Path
from typing import Any

import pytest

from maha_attn.experiments.comparison import check_comparable, differences, matter
from maha_attn.experiments.definition import Budget, Experiment, Row, experiments
from maha_attn.experiments.results import FOLDER, RefusedError, Result, read_results

SETTINGS: dict[str, Any] = {
    "task": "language_modeling",
    "pretrained": None,
    "model": {"num_scales": 4, "intermediate_size": 64, "layer_types": None, "window": 8},
    "train": {
        **{"seed": 1, "output_dir": "a", "learning_rate": 0.1, "logging_steps": 10},
        **{"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1},
    },
    "generation": {"num_beams": 1},
}
EXPERIMENT = Experiment(
    **{"name": "e", "title": "", "kind": "training", "match_parameters": "maha"},
    budgets={"small": Budget(seeds=[1, 2])},
    rows={
        "maha": Row(label="MAHA"),
        "two": Row(label="two", settings={"model.num_scales": 2}),
        "full": Row(label="full", attention="sdpa"),
    },
)


def changed(section: str, **options: Any) -> dict[str, Any]:
    return {**SETTINGS, section: {**SETTINGS[section], **options}}


def result(row: str, settings: dict[str, Any] = SETTINGS, **content: Any) -> Result:
    return Result(
        Path(f"{row}.json"),
        {
            **{"row": row, "settings": settings, "budget": "small", "device_class": "gpu"},
            **{"data": {"fingerprint": "f"}, "metrics": {"parameters": 1000}},
            **content,
        },
    )


def test_rows_may_differ_in_what_defines_them() -> None:
    other = changed("model", num_scales=2, intermediate_size=72)
    full = changed("model", layer_types=["sdpa"])
    seed = changed("train", seed=2, output_dir="b", logging_steps=1)
    cut = changed("train", per_device_train_batch_size=8, gradient_accumulation_steps=4)
    check_comparable(
        [
            *(result("maha"), result("maha", seed), result("maha", cut)),
            *(result("two", other), result("full", full)),
        ],
        EXPERIMENT,
    )


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (result("full", changed("train", learning_rate=0.2)), r"train\.learning_rate: 0.1 in maha"),
        (result("full", changed("model", window=9)), r"model\.window"),
        (result("full", changed("model", num_scales=2)), r"model\.num_scales"),
        (result("two", changed("model", layer_types=["sdpa"])), r"model\.layer_types"),
        (
            result("full", changed("train", gradient_accumulation_steps=2)),
            r"train\.rows_a_step: 32 in .*; 64 in full.json",
        ),
        (result("full", data={"fingerprint": "g"}), "data: f in maha.json; g in full.json"),
        (result("full", budget="smoke"), "budget"),
        (result("full", device_class="cpu"), "device_class"),
        (result("full", metrics={"parameters": 1021}), "parameters by more than 2%: maha has"),
    ],
)
def test_anything_else_is_refused(other: Result, what: str) -> None:
    check_comparable([result("maha"), result("maha")], EXPERIMENT)
    with pytest.raises(RefusedError, match=f"rows of one table differ in {what}"):
        check_comparable([result("maha"), other], EXPERIMENT)


def test_seeds_of_one_row_share_its_own_settings() -> None:
    first, second = (result("two", changed("model", num_scales=n)) for n in (2, 3))
    check_comparable([first, first], EXPERIMENT)
    with pytest.raises(RefusedError, match=r"model\.num_scales: 2 in two.json; 3 in two.json"):
        check_comparable([first, second], EXPERIMENT)


def test_sizes_within_two_percent_and_unknown_ones_pass() -> None:
    few = result("full", metrics={"parameters": 981})
    check_comparable([result("maha"), few, result("two", metrics={})], EXPERIMENT)
    check_comparable([few, result("two", metrics={"parameters": 5})], EXPERIMENT)  # No reference.


def test_differences_name_what_was_and_what_is() -> None:
    before, now = matter(SETTINGS), matter(changed("train", learning_rate=0.2, seed=9))
    assert differences(before, now) == ["train.learning_rate was 0.1 and is 0.2"]
    newer = matter(changed("model", option_of_a_later_version=1))
    assert differences(before, newer) == differences(newer, before) == []
    beams = changed("generation", num_beams=4)
    assert differences(before, matter(beams)) == []
    translation = [matter({**s, "task": "translation"}) for s in (SETTINGS, beams)]
    assert differences(*translation) == ["generation.num_beams was 1 and is 4"]


def test_committed_results_stand_in_one_table_each() -> None:
    folder = Path(__file__).parents[2] / FOLDER
    results, refused = read_results(folder)
    assert not refused
    assert len(results) > 50
    for name, experiment in experiments().items():
        check_comparable([r for r in results if r["experiment"] == name], experiment)
