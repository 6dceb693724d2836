"""Kill a training process many times at random moments; resume it each time.

Usage: python kill_often.py KILLS RESULT; RESULT is the JSON file to write. Libraries are imported
once and every training process is forked from this one, so that a process costs what training
costs. A training process tells through a pipe at which step it begins and which checkpoints it
completed; this one, which survives, compares:

- a process begins at the newest checkpoint that any before it had completed (or one newer, whose
  completion it was killed before telling);
- when a run reaches its end, its model, its last checkpoint and its metrics are, byte for byte,
  those of a run that nobody killed.
"""

import gc
import gzip
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maha_attn import cli
from maha_attn.bench.measure import provenance
from maha_attn.data.files import find_files
from maha_attn.tasks import runs
from maha_attn.training import checkpoint as disk
from maha_attn.training import train  # noqa: F401 - imported here, once, for all children
from maha_attn.training.metrics import MetricsFile
from maha_attn.training.trainer import RunTrainer

STEPS = 12
RECIPE = f"""
task: language_modeling
model: {{vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 2, num_scales: 3, window: 8}}
data: {{train: [book.txt], sequence_length: 32}}
train: {{max_steps: {STEPS}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-2, logging_steps: 1, save_steps: 1, save_total_limit: 2, use_cpu: true,
        report_to: none, disable_tqdm: true}}
"""
TIMES = {"elapsed_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


class Moment(NamedTuple):
    """So many seconds after a process told something for the so-manyth time."""

    after: str
    times: int
    seconds: float


def start(run: Path, log: Path) -> tuple[int, int]:
    """Fork a process that trains in ``run``; its id, and a pipe in which it tells what it does."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        return child, reader
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    begin, save, appearing = MetricsFile.on_train_begin, RunTrainer._save_checkpoint, disk.appearing

    def tell(what: str) -> None:
        os.write(writer, f"{what}\n".encode())

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        begin(self, args, state, control, **options)
        tell(f"begin {state.global_step}")

    def saving(target: Path) -> AbstractContextManager[Path]:
        tell("saving")
        return appearing(target)

    def save_checkpoint(self: Any, *args: Any) -> None:
        save(self, *args)
        tell(f"saved {self.state.global_step}")

    MetricsFile.on_train_begin = on_train_begin
    RunTrainer._save_checkpoint = save_checkpoint
    disk.appearing = saving
    runs.judge = lambda *args: {}
    cli.show = lambda *args: None  # nothing is evaluated
    how = ["--resume"] if (run / "recipe.yaml").exists() else []
    try:
        cli.main(["train", "small.yaml", *how, f"--train.output_dir={run}"])
        tell("end")
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def live(run: Path, log: Path, moment: Moment | None) -> list[str]:
    """Let a process train, kill it at some moment (None: never); what it told."""
    child, pipe = start(run, log)
    told = b""
    if moment:
        while told.count(moment.after.encode()) < moment.times and (chunk := os.read(pipe, 4096)):
            told += chunk
        time.sleep(moment.seconds)
        os.kill(child, signal.SIGKILL)
    while chunk := os.read(pipe, 4096):
        told += chunk
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    ended_well = os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    assert ended_well, log.read_text()  # it was killed, or came to its end, but did not fail
    return told.decode().splitlines()


def content(run: Path) -> dict[str, Any]:
    """What two runs are compared by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: line[name] for name in line if name not in TIMES} for line in lines[:-1]]
    checkpoint = json.loads((run / f"checkpoint-{STEPS}" / "manifest.json").read_text())["files"]
    return {
        "metrics": steps,
        "checkpoint": checkpoint,
        "model": (run / "model" / "model.safetensors").read_bytes(),
    }


def kill_often(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times; what was hit, and what was lost."""
    os.chdir(folder)
    novel = find_files("embedded:alice_in_wonderland")[0]
    (folder / "book.txt").write_bytes(gzip.decompress(novel.read_bytes())[:4000])
    (folder / "small.yaml").write_text(RECIPE)
    gc.freeze()  # the children need not look through what was imported
    chance = random.Random(seed)
    log, run, whole = folder / "log.txt", folder / "run", folder / "whole"
    started = time.perf_counter()
    assert live(whole, log, None)[-1] == "end", log.read_text()
    expected = content(whole)
    step_s = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["elapsed_s"] / STEPS
    result = {"kills": 0, "finished": 0, "while_saving": 0, "before_training": 0, "steps_lost": 0}
    saved = 0
    while result["kills"] < kills:
        moments = [
            Moment("begin", 0, chance.uniform(0, 1)),  # from the start of the process
            Moment("begin", 1, chance.uniform(0, 4 * step_s)),
            Moment("saving", chance.randint(1, 3), chance.uniform(0, step_s)),
        ]
        told = live(run, log, chance.choices(moments, weights=[1, 4, 5])[0])
        begun = [int(line.split()[1]) for line in told if line.startswith("begin")]
        if begun:
            result["steps_lost"] += max(0, saved - begun[0])
            assert begun[0] in (saved, saved + 1), f"began at {begun[0]}, after {saved} was saved"
        saved = max(
            [saved, *(int(line.split()[1]) for line in told if line[:5] in ("begin", "saved"))]
        )
        if told[-1:] != ["end"]:
            result["kills"] += 1
            result["while_saving"] += any(run.glob(".checkpoint-*.partial"))
            result["before_training"] += not begun
        if saved == STEPS or told[-1:] == ["end"]:
            assert told[-1:] == ["end"] or live(run, log, None)[-1] == "end", log.read_text()
            assert content(run) == expected, "not the same as the run that nobody killed"
            result["finished"] += 1
            saved = 0
            shutil.rmtree(run)
    return {**result, "step_s": step_s, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    kills, file, seed = int(sys.argv[1]), Path(sys.argv[2]).absolute(), 0
    command = f"python tests/training/{Path(__file__).name} {kills} {sys.argv[2]}"
    document = provenance(command, {"recipe": RECIPE, "seed": seed}, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        document |= kill_often(Path(folder), kills, seed)
    file.write_text(json.dumps(document, indent=2) + "\n")
