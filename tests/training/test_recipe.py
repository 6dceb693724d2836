"""Recipes: what the file says, what overrides it, and what the help leaves out."""

from pathlib import Path

import pytest
import yaml

from maha_attn.spec import AttentionSpec
from maha_attn.tasks import TASKS
from maha_attn.training.recipe import (
    Recipe,
    find_recipe,
    parse_recipe,
    print_help,
    read_recipe,
    recipe_parser,
)

PARSER = recipe_parser(TASKS["language_modeling"].sections())


def load_recipe(path: str, overrides: list[str], variants: list[str] | None = None) -> Recipe:
    return parse_recipe(PARSER, read_recipe(path, variants), path, overrides)


def test_demo_recipe_is_complete_and_can_be_overridden(checkout: Path) -> None:
    overrides = ["--model.window=16", "--train.adam_beta2=0.9", "--data.held_out=0.2"]
    recipe = load_recipe("recipes/demo.yaml", overrides)
    written = yaml.safe_load((checkout / "recipes" / "demo.yaml").read_text())
    assert recipe.model.hidden_size == written["model"]["hidden_size"]
    assert recipe.model.window == recipe.settings["model"]["window"] == 16
    assert recipe.train.adam_beta2 == recipe.settings["train"]["adam_beta2"] == 0.9
    assert recipe.data.held_out == 0.2
    assert recipe.train.output_dir == str(Path("runs") / "demo")


def test_settings_of_a_run_are_a_recipe_again(tmp_path: Path) -> None:
    first = load_recipe("recipes/demo.yaml", [])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first.settings))
    again = load_recipe(str(tmp_path / "again.yaml"), [])
    assert again.settings == first.settings
    assert again.model.to_dict() == first.model.to_dict()


VARIANTS = """
task: language_modeling
model: {window: 8}
data: {train: a, columns: {text: body}}
seeds: [1, 2]
variants:
  wide: {model: {window: 32}, data: {train: [b, c]}}
  long: {data: {columns: {text: words}}, seeds: [3]}
  wrong: {modell: {window: 1}}
"""


def test_variants_change_what_they_name_in_the_order_given(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text(VARIANTS)
    recipe = read_recipe(str(file), ["wide", "long"])
    assert recipe == {
        "task": "language_modeling",
        "model": {"window": 32},
        "data": {"train": ["b", "c"], "columns": {"text": "words"}},
        "seeds": [3],
    }
    assert read_recipe(str(file))["model"] == {"window": 8}
    with pytest.raises(ValueError, match="no variant 'tall'; there are wide, long, wrong"):
        read_recipe(str(file), ["tall"])
    with pytest.raises(ValueError, match="got modell"):
        read_recipe(str(file), ["wrong"])


def test_a_schedule_must_have_what_it_needs() -> None:
    bare = "--train.lr_scheduler_type=cosine_with_min_lr"
    with pytest.raises(ValueError, match=r"train\.lr_scheduler_type cosine_with_min_lr .* None: "):
        load_recipe("recipes/demo.yaml", [bare])
    whole = '--train.lr_scheduler_kwargs={"min_lr": 1.0e-5}'
    assert load_recipe("recipes/demo.yaml", [bare, whole]).train.lr_scheduler_kwargs


def test_early_stopping_needs_a_best_model() -> None:
    stop = "--train.early_stopping_patience=3"
    with pytest.raises(
        ValueError, match=r"needs train\.load_best_model_at_end: .* got 3 .*: false"
    ):
        load_recipe("recipes/demo.yaml", [stop])
    best = ["--train.load_best_model_at_end=true", "--train.eval_strategy=steps"]
    assert load_recipe("recipes/demo.yaml", [stop, *best]).train.early_stopping_patience == 3
    with pytest.raises(ValueError, match=r"must be at least 1 and .* got 0 .*: true"):
        load_recipe("recipes/demo.yaml", ["--train.early_stopping_patience=0", *best])


def test_a_recipe_here_comes_before_one_of_the_package(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("recipes/demo.yaml").samefile(checkout / "recipes" / "demo.yaml")
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").touch()
    assert find_recipe("recipes/demo.yaml").samefile(tmp_path / "recipes" / "demo.yaml")


def test_help_shows_the_attention_and_hides_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    print_help(PARSER)
    shown = capsys.readouterr().out
    for name in vars(AttentionSpec(hidden_size=8, num_heads=2)):
        assert name in ("num_heads", "causal") or f"--model.{name} " in shown
    assert "--train.learning_rate " in shown
    assert "--train.deepspeed" not in shown
    assert "--model.id2label" not in shown
    assert "ρ > 0 of the fusion problem. (type: float, default: 0.01)" in " ".join(shown.split())
