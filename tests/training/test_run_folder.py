"""Run folders: the newest whole checkpoint, and what a run depended on."""

import subprocess
from pathlib import Path

import pytest
import torch

from maha_attn.training.run_folder import RunFolder, create_run, environment, resume_run

SETTINGS = {"model": {"window": 8}, "data": {"files": ["a"]}, "train": {"seed": 3}}


def checkpoint(run: RunFolder, step: int, whole: bool = True) -> Path:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    if whole:
        (folder / "trainer_state.json").touch()
    return folder


def test_last_checkpoint_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    run = create_run(str(tmp_path / "run"), SETTINGS)
    assert run.last_checkpoint() is None
    checkpoint(run, 9)
    newest = checkpoint(run, 10)
    checkpoint(run, 11, whole=False)
    assert run.last_checkpoint() == newest


def test_resume_keeps_to_the_model_and_the_data(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    checkpoint(create_run(path, SETTINGS), 1)
    more_steps = {**SETTINGS, "train": {"seed": 3, "max_steps": 99}}
    assert resume_run(path, more_steps).path == Path(path)
    for other, message in [
        ({"model": {"window": 9}}, "model.window was 8 there and is 9 now"),
        ({"data": {"files": ["a"], "held_out": 0.2}}, "data.held_out was None there and is 0.2"),
        ({"data": {}}, r"data.files was \['a'\] there and is None now"),
    ]:
        with pytest.raises(ValueError, match=message):
            resume_run(path, {**SETTINGS, **other})


def test_environment_names_the_commit_of_the_code(checkout: Path) -> None:
    found = environment()
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert found["packages"]["torch"] == torch.__version__
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["device_name"]
