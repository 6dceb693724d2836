"""What a recipe's train section asks for happens: schedule, precision, memory, batches."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from maha_attn.layers.attention import MultiscaleAttention

from .conftest import Train

STEPS, WARMUP, RATE = 8, 3, 1e-3


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """The learning rates that optimizers used."""
    seen: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    yield seen
    hook.remove()


def logged(tmp_path: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def decay(schedule: str, done: float) -> float:
    """What is left of the learning rate when a part of the steps after warm-up is done."""
    cosine = 0.5 + 0.5 * torch.tensor(done * torch.pi).cos().item()
    return {"linear": 1 - done, "cosine": cosine, "constant_with_warmup": 1.0}[schedule]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_warmup_and_schedule(
    train: Train, tmp_path: Path, rates: list[float], schedule: str
) -> None:
    train(
        "sst.yaml",
        *(f"--train.max_steps={STEPS}", f"--train.warmup_steps={WARMUP}"),
        *(f"--train.learning_rate={RATE}", f"--train.lr_scheduler_type={schedule}"),
    )
    expected = [RATE * step / WARMUP for step in range(WARMUP)]
    after = STEPS - WARMUP
    expected += [RATE * decay(schedule, step / after) for step in range(after)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert [line["learning_rate"] for line in logged(tmp_path)] == pytest.approx(rates)


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_of_products_and_not_of_weights(train: Train, tmp_path: Path, bf16: bool) -> None:
    kinds: dict[str, set[Any]] = {"products": set(), "weights": set(), "gradients": set()}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and isinstance(module, nn.Linear):
            kinds["products"].add(output.dtype)
            kinds["weights"].add(module.weight.dtype)

    def look_at_gradients(optimizer: Any, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        kinds["gradients"].update(p.grad.dtype for p in parameters if p.grad is not None)

    hooks = register_module_forward_hook(look), register_optimizer_step_pre_hook(look_at_gradients)
    try:
        train("sst.yaml", f"--train.bf16={str(bf16).lower()}")
    finally:
        for hook in hooks:
            hook.remove()
    fp32 = {torch.float32}
    products = {torch.bfloat16} if bf16 else fp32
    assert kinds == {"products": products, "weights": fp32, "gradients": fp32}
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == fp32


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # its name in 5.17
@pytest.mark.parametrize("recipe", ["sst.yaml", "ende.yaml"])
def test_checkpointing_runs_every_block_again(train: Train, tmp_path: Path, recipe: str) -> None:
    calls: Counter[str] = Counter()
    run = "plain"

    def count(module: nn.Module, inputs: Any) -> None:
        if module.training and isinstance(module, MultiscaleAttention):
            calls[run] += 1

    hook = register_module_forward_pre_hook(count)
    weights = {}
    try:
        for run in ("plain", "checkpointed"):
            option = f"--train.gradient_checkpointing={str(run != 'plain').lower()}"
            train(recipe, "--overwrite", option)
            weights[run] = load_file(tmp_path / "run" / "model" / "model.safetensors")
    finally:
        hook.remove()
    assert calls["checkpointed"] == 2 * calls["plain"] > 0
    for name, weight in weights["plain"].items():
        assert torch.equal(weight, weights["checkpointed"][name]), name


@pytest.mark.parametrize("recipe", ["sst.yaml", "ende.yaml"])
def test_accumulated_batches_teach_what_one_large_one_does(
    train: Train, tmp_path: Path, recipe: str
) -> None:
    """Rows differ in length, and the epoch's last batch has fewer: each row counts the same."""
    found = []
    for batch, times in ((10, 1), (5, 2)):
        train(
            recipe,
            *("--overwrite", "--train.max_steps=4", "--train.optim=sgd"),
            *("--train.learning_rate=0.1", f"--train.per_device_train_batch_size={batch}"),
            f"--train.gradient_accumulation_steps={times}",
        )
        weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
        found.append((logged(tmp_path), weights))
    (whole, weights), (parts, accumulated) = found
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, weight in weights.items():
        assert torch.allclose(accumulated[name], weight, atol=1e-5), name
