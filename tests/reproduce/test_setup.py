"""Recipes of rows: of equal size, and complete without the data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maha_attn.experiments.comparison import PARAMETERS_WITHIN, differences, matter
from maha_attn.experiments.definition import Budget, Experiment, Row, experiments
from maha_attn.models.parameters import count_parameters
from maha_attn.reproduce.job import Job
from maha_attn.reproduce.setup import prepare, row_recipe, row_settings
from maha_attn.tasks.runs import find_task

MATCHED = [
    pytest.param(name, budget, marks=[pytest.mark.slow] if budget == "paper" else [])
    for name, experiment in experiments().items()
    if experiment.match_parameters
    for budget in ("small", "paper")
]


def row_job(experiment: Experiment, row: str, budget: str) -> Job:
    named = {"experiment": experiment, "row": row, "seed": 1, "budget": budget}
    return Job(**named, folder=Path("runs"), device=torch.device("cpu"))


def size(job: Job) -> int:
    recipe = row_recipe(job)
    return count_parameters(recipe.model, find_task(recipe.settings).model_class)


@pytest.mark.parametrize(("name", "budget"), MATCHED)
def test_every_row_is_as_large_as_its_reference(name: str, budget: str) -> None:
    experiment = experiments()[name]
    assert experiment.match_parameters is not None
    wanted = size(row_job(experiment, experiment.match_parameters, budget))
    for row in experiment.rows:
        found = size(row_job(experiment, row, budget))
        assert abs(found - wanted) <= PARAMETERS_WITHIN * wanted, row


def test_the_largest_row_has_a_feed_forward_part_of_its_width_at_the_papers_settings() -> None:
    recipe = row_recipe(row_job(experiments()["ablations"], "dense-conv", "paper"))
    assert recipe.model.intermediate_size == recipe.model.hidden_size


def test_the_settings_without_the_data_are_those_of_the_run() -> None:
    experiment = Experiment(
        **{"name": "tiny", "title": "", "kind": "training", "recipe": "recipes/lm_books.yaml"},
        match_parameters="maha",
        budgets={"smoke": Budget(seeds=[1], variants=["smoke"])},
        rows={"maha": Row(label="MAHA"), "full": Row(label="full", attention="sdpa")},
    )
    job = row_job(experiment, "full", "smoke")
    setup = prepare(job)
    assert row_settings(job) == setup.recipe.settings
    assert setup.recipe.model.layer_types == ["sdpa", "sdpa"]
    assert setup.recipe.settings["model"]["intermediate_size"] > 48
    other = replace(job, seed=2, experiment=replace(experiment, settings={"model.window": 9}))
    changes = differences(matter(setup.recipe.settings), matter(row_settings(other)))
    assert changes == ["model.window was 64 and is 9"]
