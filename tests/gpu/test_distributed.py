"""Two GPUs train as one does, with copies and with a divided model, and exchange checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

RECIPE = """
task: language_modeling
model: {vocab_size: 300, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
        num_attention_heads: 2, num_scales: 3, window: 16}
data: {train: [book.txt], sequence_length: 128}
train: {max_steps: 12, per_device_train_batch_size: 4, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-3, logging_steps: 1, save_steps: 6, report_to: none,
        disable_tqdm: true}
generation: {max_new_tokens: 1}
"""


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, novel: str
) -> None:
    (tmp_path / "book.txt").write_text(novel[:30000])
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "from maha_attn.cli import main; main()", "train"]
    subprocess.run([*command, "small.yaml", "--train.output_dir=one"], check=True)
    script = checkout / "tests" / "training" / "several_processes.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    subprocess.run([*torchrun, str(script)], env=environment, check=True)
    for run in ("copied", "divided", "divided-again", "one-to-several"):
        assert losses(Path(run)) == pytest.approx(losses(Path("one")), rel=1e-3)
    for rank in (0, 1):
        seen = json.loads(Path(f"processes-{rank}.json").read_text())
        assert all(note["wrapper"] == "DistributedDataParallel" for note in seen["copied"])
        assert all(note["parameters_are_dtensors"] for note in seen["divided"])
