"""A language model's run: its result, stopped by the clock and continued, equal parameters."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maha_attn.evaluation.causality import LeakError
from maha_attn.experiments.definition import Budget, Experiment, Row
from maha_attn.experiments.statistics import bits_per_byte
from maha_attn.layers.attention import MultiscaleAttention
from maha_attn.reproduce.books import PASSAGE_TOKENS
from maha_attn.reproduce.job import Clock, Job
from maha_attn.reproduce.setup import prepare
from maha_attn.reproduce.training import judge_by_task, train_and_judge

TINY = {
    **{"model.intermediate_size": 64, "model.num_hidden_layers": 1, "model.window": 8},
    **{"train.max_steps": 6, "train.logging_steps": 1, "train.save_strategy": "no"},
    **{"train.per_device_train_batch_size": 2},
    **{"evaluation.batch_size": 64, "evaluation.usage_rows": 1},
}
EXPERIMENT = Experiment(
    **{"name": "tiny", "title": "", "kind": "training", "recipe": "recipes/lm_books.yaml"},
    match_parameters="maha",
    explained=["maha"],
    budgets={"smoke": Budget(seeds=[1], variants=["smoke"], settings=TINY)},
    rows={
        "maha": Row(label="MAHA"),
        "sliding": Row(label="w", settings={"model.num_scales": 1, "model.preset": "window"}),
    },
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        **{"experiment": EXPERIMENT, "row": "maha", "seed": 1, "budget": "smoke"},
        folder=tmp_path / "run",
        device=torch.device("cpu"),
    )


class Alarm(Clock):
    """Rings after a number of steps."""

    def __init__(self, after: int) -> None:
        super().__init__(show=self.count)
        self.after, self.steps = after, 0

    def count(self, done: int, total: int, note: str) -> None:
        self.steps = done

    @property
    def is_up(self) -> bool:
        return self.steps >= self.after


def test_stopped_and_continued_equals_at_once(job: Job) -> None:
    whole = train_and_judge(job, Clock())
    assert whole is not None
    again = replace(job, folder=job.folder.with_name("again"))
    assert train_and_judge(again, Alarm(after=3)) is None
    assert (again.folder / "checkpoint-3").is_dir()
    assert not (again.folder / "model").exists()
    continued = train_and_judge(again, Clock())
    assert continued is not None
    assert continued["curves"] == whole["curves"]
    assert continued["documents"] == whole["documents"]
    assert not list(again.folder.glob("checkpoint-*"))
    _check_result(whole, job)


def _check_result(result: dict[str, Any], job: Job) -> None:
    metrics = result["metrics"]
    assert metrics["bits_per_byte"] == pytest.approx(bits_per_byte(result["documents"]))
    assert metrics["final_loss"] == result["curves"]["loss"][-1]
    assert metrics["tokens_per_s"] == 64 * metrics["sequences_per_s"] > 0
    tokens = sum(document["tokens"] for document in result["documents"])
    right = sum(document["correct"] for document in result["documents"])
    assert metrics["token_accuracy"] == pytest.approx(100 * right / tokens)
    assert metrics["causal"] is True
    _check_fusion(result)
    assert metrics["peak_bytes"] is None  # on a CPU
    assert result["curves"]["tokens"] == [128 * step for step in range(1, 7)]
    assert metrics["bits_per_byte_error"] is None  # of one document there is none
    assert result["settings"]["train"]["seed"] == job.seed
    assert len(result["data"]["fingerprint"]) == 64
    json.dumps(result, allow_nan=False)


def _check_fusion(result: dict[str, Any]) -> None:
    fusion, attention = result["fusion"], result["attention"]
    assert len(fusion["moved_by_head"]) == 1  # layer
    assert len(fusion["moved_by_head"][0]) == 2  # heads
    assert 0 < fusion["moved_untrained"] < fusion["moved"] < 1
    static = [{**d, "nll": d["static_nll"]} for d in result["documents"]]
    assert result["metrics"]["static_bits_per_byte"] == pytest.approx(bits_per_byte(static))
    assert result["metrics"]["static_bits_per_byte"] != result["metrics"]["bits_per_byte"]
    assert len(attention["layers"][0]["scales"]) == 4
    assert len(attention["tokens"]) == PASSAGE_TOKENS
    assert attention["start"] > 1000  # Past the title and the contents.
    assert not attention["tokens"][0].startswith("\n")


def test_other_settings_start_anew(job: Job) -> None:
    assert train_and_judge(job, Alarm(after=3)) is None
    other = replace(EXPERIMENT, settings={"model.ratio": 4})
    result = train_and_judge(replace(job, experiment=other), Clock())
    assert result is not None
    assert len(result["curves"]["loss"]) == 6
    assert result["settings"]["model"]["ratio"] == 4


def test_a_model_that_looks_ahead_has_no_result(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MultiscaleAttention.forward

    def leaking(*arguments: Any, **options: Any) -> Any:
        y = forward(*arguments, **options)
        return y + y.roll(-1, 1) if isinstance(y, torch.Tensor) else y

    monkeypatch.setattr(MultiscaleAttention, "forward", leaking)
    with pytest.raises(LeakError, match="the model looks ahead"):
        train_and_judge(job, Clock())


def test_a_result_says_how_bleu_was_counted(job: Job) -> None:
    found = {"bleu_signature": "nrefs:1|…"}
    evaluation = {"metrics": {"validation": {"bleu": 1.0}, "test": {"bleu": 2.0}}}
    task: Any = SimpleNamespace(evaluate=lambda model: evaluation | {"signatures": found})
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    result = judge_by_task(task, model, prepare(job).recipe)
    assert result == {"metrics": {"bleu": 2.0}, "part": "test", "signatures": found}


def test_runs_beside_others_have_no_speed(job: Job) -> None:
    result = train_and_judge(replace(job, shares_device=True), Clock())
    assert result is not None
    assert result["metrics"]["sequences_per_s"] is result["metrics"]["tokens_per_s"] is None


def test_attention_is_kept_where_it_is_asked_for(job: Job) -> None:
    other = replace(job, experiment=replace(EXPERIMENT, explained=[]))
    assert other.explains < job.explains
    assert replace(job, seed=2).explains is False
    result = train_and_judge(other, Clock())
    assert result is not None
    assert "attention" not in result


def test_that_training_diverged_is_a_result(job: Job) -> None:
    settings = {"train.learning_rate": 1e30, "train.max_grad_norm": 0.0, "train.optim": "sgd"}
    rows = {"maha": Row(label="MAHA", settings=settings)}
    result = train_and_judge(replace(job, experiment=replace(EXPERIMENT, rows=rows)), Clock())
    assert result is not None
    assert 1 <= result["diverged"] <= 6
    assert result["metrics"]["parameters"] > 0
    assert not {"bits_per_byte", "final_loss"} & set(result["metrics"])
    assert len(result["curves"]["loss"]) < result["diverged"] + 1
    json.dumps(result, allow_nan=False)
