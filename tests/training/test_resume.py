"""Resuming, through the command line: the same run bit for bit, or a refusal that says why."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from maha_attn.cli import main
from maha_attn.training import checkpoint as disk

STEPS = 100
RECIPE = f"""
task: language_modeling
model: {{vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 2, num_scales: 3, window: 8}}
data: {{train: [book.txt], sequence_length: 32}}
train: {{max_steps: {STEPS}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-2, warmup_steps: 10, logging_steps: 3, save_steps: 25, seed: 1,
        use_cpu: true, report_to: none, disable_tqdm: true, average_tokens_across_devices: false}}
generation: {{max_new_tokens: 2}}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, novel: str) -> Path:
    """A folder with a recipe, its text, and a run of a hundred steps and several epochs."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "book.txt").write_text(novel[:8000])
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "small.yaml"])
    return folder


@pytest.fixture
def run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run as it was when it was killed after step 80."""
    monkeypatch.chdir(workplace)
    shutil.copytree(workplace / "runs" / "small", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoint-100")
    return tmp_path / "run"


def resume(run: Path, *overrides: str) -> None:
    main(["train", "small.yaml", "--resume", f"--train.output_dir={run}", *overrides])


def refused(run: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Resume, which must fail with one line; returns it."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        resume(run, *overrides)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after progress bars
    settings = run / "recipe.yaml"
    assert before.keys() == {path for path in run.rglob("*") if path.is_file()}
    assert all(path == settings or path.read_bytes() == was for path, was in before.items())
    return line


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = {"elapsed_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    return [{name: line[name] for name in line if name not in times} for line in lines]


def files(checkpoint: Path) -> dict[str, Any]:
    """Size and SHA-256 of everything in a checkpoint."""
    return json.loads((checkpoint / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("killed_after", [25, 50, 75, 100])
def test_resumed_equals_uninterrupted(workplace: Path, run: Path, killed_after: int) -> None:
    whole = workplace / "runs" / "small"
    if killed_after == STEPS:  # while the trained model was being written
        shutil.copytree(whole / "checkpoint-100", run / "checkpoint-100")
    for step in (25, 50, 75):
        if step > killed_after:
            shutil.rmtree(run / f"checkpoint-{step}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "los')
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the generator that is restored
    torch.manual_seed(5)
    resume(run)
    # Weights, optimizer, schedule, random generators, losses: every byte of every file.
    assert files(run / "checkpoint-100") == files(whole / "checkpoint-100")
    assert files(run / "checkpoint-100").keys() > {"training_state.safetensors"}
    trained = (run / "model" / "model.safetensors").read_bytes()
    assert trained == (whole / "model" / "model.safetensors").read_bytes()
    logged, expected = metrics(run), metrics(whole)
    assert logged[:-1] == expected[:-1]
    assert [line["step"] for line in logged[:-1]] == list(range(3, STEPS + 1, 3))
    assert (logged[-1]["step"], "train_loss" in logged[-1]) == (STEPS, True)


def test_the_hundred_steps_are_what_the_test_above_needs(workplace: Path) -> None:
    checkpoints = disk.checkpoints(workplace / "runs" / "small")
    epochs = [json.loads((c / "trainer_state.json").read_text())["epoch"] for c in checkpoints]
    assert len(epochs) == 4
    assert epochs[-1] > 2
    assert all(epoch % 1 for epoch in epochs), "a checkpoint at the end of an epoch tests less"
    losses = [line["loss"] for line in metrics(workplace / "runs" / "small") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


def test_more_steps_may_be_asked_for(run: Path) -> None:
    resume(run, "--train.max_steps=77", "--train.logging_steps=1")
    assert [line["step"] for line in metrics(run)][-3:] == [76, 77, 77]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 77


def test_a_run_killed_before_its_first_checkpoint_starts_anew(workplace: Path, run: Path) -> None:
    for checkpoint in disk.checkpoints(run):
        shutil.rmtree(checkpoint)
    resume(run, "--train.max_steps=3")
    assert metrics(run)[0]["loss"] == metrics(workplace / "runs" / "small")[0]["loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.window=9", "model.window was 8 there and is 9 now"),
        ("--data.sequence_length=64", "data.sequence_length was 32 there and is 64 now"),
        ("--train.learning_rate=0.1", "train.learning_rate was 0.01 there and is 0.1 now"),
        ("--train.seed=2", "train.seed was 1 there and is 2 now"),
        ("--train.per_device_train_batch_size=4", "number of rows a step was 4 there and is 8"),
    ],
)
def test_another_recipe_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in refused(run, capsys, override)


def test_steps_may_be_cut_into_other_batches(workplace: Path, run: Path) -> None:
    cut = ("--train.per_device_train_batch_size=4", "--train.gradient_accumulation_steps=1")
    resume(run, *cut)
    expected = metrics(workplace / "runs" / "small")
    for now, then in zip(metrics(run)[:-1], expected[:-1], strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda words: [word.replace("Alice", "Bruno") for word in words], "tokenizer was"),
        (lambda words: words[:600] + words[900:], "number of training rows was"),
        (lambda words: words[:100] + words[200:300] + words[100:200] + words[300:], "content of"),
    ],
)
def test_another_text_is_refused(
    workplace: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    changed: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    text = (workplace / "book.txt").read_text()
    tokenizer = f"--data.tokenizer={run / 'checkpoint-75'}" if "number" in message else ""
    if tokenizer:  # as if the run had been made with it
        settings = yaml.safe_load((run / "recipe.yaml").read_text())
        manifest = json.loads((run / "checkpoint-75" / "manifest.json").read_text())
        manifest["belongs_to"]["data.tokenizer"] = str(run / "checkpoint-75")
        settings["data"]["tokenizer"] = str(run / "checkpoint-75")
        (run / "recipe.yaml").write_text(yaml.safe_dump(settings))
        (run / "checkpoint-75" / "manifest.json").write_text(json.dumps(manifest))
    try:
        (workplace / "book.txt").write_text(" ".join(changed(text.split(" "))))
        assert message in refused(run, capsys, *filter(None, [tokenizer]))
    finally:
        (workplace / "book.txt").write_text(text)


PICKLES = [
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "pytorch_model_fsdp.bin"),
    *("training_state.safetensors", "model.safetensors", "trainer_state.json", "config.json"),
]


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_from_a_run_folder_is_run(
    run: Path, trap: Any, capsys: pytest.CaptureFixture[str], name: str, forged: bool
) -> None:
    checkpoint = run / "checkpoint-75"
    trap.set(checkpoint / name)
    if not forged:
        assert name in refused(run, capsys)
    else:
        (checkpoint / "manifest.json").write_text(forge(checkpoint))
        if name.endswith(("safetensors", "trainer_state.json")):
            with pytest.raises((SystemExit, ValueError, SafetensorError)):
                resume(run, "--train.max_steps=76")
        else:
            resume(run, "--train.max_steps=76")
    assert not trap.sprung


def forge(checkpoint: Path) -> str:
    """A manifest that fits whatever is in the checkpoint."""
    belongs_to = disk.belongs_to(checkpoint)
    (checkpoint / "manifest.json").unlink()
    disk.write_manifest(checkpoint, belongs_to)
    return (checkpoint / "manifest.json").read_text()


def test_nothing_is_unpickled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in [
        *((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")),
        *((torch, "load"), (np, "load")),
    ]:
        monkeypatch.setattr(module, name, forbidden)
    resume(run, "--train.max_steps=76")
    main(["generate", str(run), "Alice", "--max_new_tokens=1"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run(
    workplace: Path,
    run: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = small_disk / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["train", "small.yaml", f"--train.output_dir={full}", "--train.save_steps=1"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after progress bars
    (*_, last) = disk.checkpoints(full)
    assert f"no space left on the disk of {full}" in line
    assert f"{last.name} is complete: free some space and go on with --resume" in line
    disk.verify(last)
    assert not list(full.glob(".*partial"))
    for checkpoint in disk.checkpoints(full)[:-1]:
        shutil.rmtree(checkpoint)
    resume(full, "--train.save_total_limit=2", "--train.save_steps=5")
    whole = workplace / "runs" / "small"
    trained = (full / "model" / "model.safetensors").read_bytes()
    assert trained == (whole / "model" / "model.safetensors").read_bytes()
    assert metrics(full)[:-1] == metrics(whole)[:-1]


@pytest.mark.parametrize(
    "file", ["training_state.safetensors", "manifest.json", "model.safetensors"]
)
def test_a_write_without_space_leaves_the_old_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    synchronise = disk._synchronise

    def full(path: Path) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(path)

    monkeypatch.setattr(disk, "_synchronise", full)
    with pytest.raises(SystemExit):
        resume(run, "--train.save_steps=76")
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in disk.checkpoints(run)][-1] == "checkpoint-75"
    disk.verify(run / "checkpoint-75")
    assert not list(run.glob(".*partial"))


def test_the_best_checkpoint_is_kept_and_loaded(run: Path) -> None:
    best = ("--train.load_best_model_at_end=true", "--train.eval_strategy=steps")
    resume(run, *best, "--train.save_steps=4", "--train.eval_steps=4", "--train.max_steps=84")
    state = json.loads((run / "checkpoint-84" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run / f"checkpoint-{state['best_global_step']}")
    evaluated = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert state["best_metric"] == min(evaluated)
    trained = (run / "model" / "model.safetensors").read_bytes()
    best_weights = run / f"checkpoint-{state['best_global_step']}" / "model.safetensors"
    assert trained == best_weights.read_bytes()
