"""Run folders: what may be resumed, and what a run depended on."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from maha_attn.training.checkpoint import RunError, appearing, write_manifest
from maha_attn.training.identity import identify_settings
from maha_attn.training.run_folder import RunFolder, create_run, environment, resume_run

SETTINGS = {"model": {"window": 8}, "data": {"files": ["a"]}, "train": {"seed": 3}}


def checkpoint(run: RunFolder, step: int, settings: dict[str, Any] = SETTINGS) -> Path:
    folder = run.path / f"checkpoint-{step}"
    with appearing(folder) as hidden:
        write_manifest(hidden, identify_settings(settings))
    return folder


def test_last_checkpoint_is_the_newest(tmp_path: Path) -> None:
    run = create_run(str(tmp_path / "run"), SETTINGS)
    assert run.last_checkpoint() is None
    checkpoint(run, 9)
    newest = checkpoint(run, 10)
    (run.path / ".checkpoint-11.partial").mkdir()
    (run.path / "checkpoint-old").mkdir()
    assert run.last_checkpoint() == newest


def test_resume_keeps_to_the_settings_that_decide_what_is_learned(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    run = create_run(path, SETTINGS)
    checkpoint(run, 1)
    longer = {**SETTINGS, "train": {"seed": 3, "max_steps": 99}, "generation": {"prompt": "x"}}
    assert resume_run(path, longer).settings() == longer
    for other, message in [
        ({"model": {"window": 9}}, "model.window was 8 there and is 9 now"),
        ({"data": {"files": ["a"], "held_out": 0.2}}, "data.held_out was None there and is 0.2"),
        ({"train": {"seed": 4}}, "train.seed was 3 there and is 4 now"),
    ]:
        with pytest.raises(RunError, match=message):
            resume_run(path, {**SETTINGS, **other})
    assert run.settings() == longer


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = create_run(str(tmp_path / "run"), SETTINGS)
    checkpoint(run, 1, {**SETTINGS, "model": {"window": 16}})
    with pytest.raises(RunError, match=r"model.window was 16 there and is 8 now"):
        resume_run(str(run.path), SETTINGS)


def test_resume_wants_a_run_folder_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder to resume from"):
        resume_run(str(tmp_path), SETTINGS)
    run = create_run(str(tmp_path / "run"), SETTINGS)
    assert resume_run(str(run.path), SETTINGS).last_checkpoint() is None


def test_a_run_killed_while_it_was_created_can_be_created_again(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.partial").write_text("model: {win")
    run = create_run(str(tmp_path), SETTINGS)
    assert run.settings() == SETTINGS
    run.environment.unlink()
    assert resume_run(str(tmp_path), SETTINGS).environment.exists()


def test_environment_names_the_commit_of_the_code(checkout: Path) -> None:
    found = environment()
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert found["packages"]["torch"] == torch.__version__
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["device_name"]
