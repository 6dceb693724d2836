"""The recipes of the tasks: each runs on genuine samples, small; variants match in size."""

import json
from pathlib import Path

import pytest
import torch

from maha_attn.cli import main
from maha_attn.tasks import TASKS
from maha_attn.training.recipe import parse_recipe, read_recipe, recipe_parser

CPU = ("--train.use_cpu=true", "--train.disable_tqdm=true", "--train.report_to=[none]")
MEASURES = {
    "sst2": "accuracy",
    "mnli": "accuracy",
    "squad": "best_f1",
    "translation": "bleu",
    "mlm": "masked_accuracy",
    "lm_books": "bits_per_byte",
}


OF_THE_PACKAGE = ("mlm", "lm_books")
"""Recipes whose smoke variant reads a novel of the package."""


@pytest.mark.parametrize("name", MEASURES)
def test_smoke(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name not in OF_THE_PACKAGE:
        monkeypatch.setenv("MAHA_DATA", str(request.getfixturevalue("shared_data")))
    run = tmp_path / "run"
    recipe = f"recipes/{name}.yaml"
    main(["train", recipe, "--variant", "smoke", *CPU, f"--train.output_dir={run}"])
    result = json.loads((run / "evaluation.json").read_text())
    assert MEASURES[name] in result["metrics"]["validation"]
    main(["eval", str(run)])
    assert json.loads((run / "evaluation.json").read_text()) == result


def num_parameters(name: str, variants: list[str]) -> int:
    raw = read_recipe(f"recipes/{name}.yaml", variants)
    task = TASKS[raw["task"]]
    overrides = ["--train.bf16=false", "--train.tf32=null"]
    config = parse_recipe(recipe_parser(task.sections()), raw, name, overrides).model
    with torch.device("meta"):
        return task.model_class(config).num_parameters()


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("mlm", variant) for variant in ("full", "sliding", "two_scales")),
        *(("translation", variant) for variant in ("full", "sliding")),
    ],
)
def test_variants_have_as_many_parameters(name: str, variant: str) -> None:
    base = num_parameters(name, ["gpu"])
    assert num_parameters(name, ["gpu", variant]) == pytest.approx(base, rel=2e-3)


@pytest.mark.slow
def test_sst2_learns(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAHA_DATA", str(shared_data))
    run = tmp_path / "run"
    main(["train", "recipes/sst2.yaml", *CPU, f"--train.output_dir={run}"])
    found = json.loads((run / "evaluation.json").read_text())["metrics"]["validation"]
    assert found["accuracy"] > 75  # 51 by saying the commonest class
