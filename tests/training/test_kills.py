"""Sixty times training is killed at a random moment; nothing is lost but the step it was in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_every_kill_is_survived(tmp_path: Path, kills: int) -> None:
    script, file = Path(__file__).with_name("kill_often.py"), tmp_path / "kills.json"
    command = [sys.executable, str(script), str(kills), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert result["kills"] == kills
    assert result["steps_lost"] == 0  # beyond the last checkpoint
    assert result["while_saving"] >= kills // 6
    assert result["finished"] >= kills // 20  # and compared with a run that nobody killed
