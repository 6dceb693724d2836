"""Sixty times training is killed at a random moment; nothing is lost but the step it was in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
task: language_modeling
model: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 2, num_scales: 3, window: 8}
data: {train: [book.txt], sequence_length: 32}
train: {max_steps: 12, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-2, logging_steps: 1, save_steps: 1, save_total_limit: 2, use_cpu: true,
        report_to: none, disable_tqdm: true}
"""


@pytest.mark.parametrize("kills", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_every_kill_is_survived(tmp_path: Path, kills: int, novel: str) -> None:
    (tmp_path / "book.txt").write_text(novel[:4000])
    (tmp_path / "small.yaml").write_text(RECIPE)
    script = Path(__file__).with_name("kill_often.py")
    command = [sys.executable, str(script), str(tmp_path), str(kills), "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["kills"] == kills
    assert result["steps_lost"] == 0  # beyond the last checkpoint
    assert result["while_saving"] >= kills // 6
    assert result["finished"] >= kills // 20  # and compared with a run that nobody killed
