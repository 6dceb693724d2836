"""Two processes on the CPU (gloo) train as one does, with copies and with a divided model."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from maha_attn.cli import main

RECIPE = """
task: language_modeling
model: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
        num_attention_heads: 2, num_scales: 3, window: 8}
data: {train: [book.txt], sequence_length: 32}
train: {max_steps: 12, per_device_train_batch_size: 4, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-3, logging_steps: 1, save_steps: 6, use_cpu: true,
        report_to: none, disable_tqdm: true}
generation: {max_new_tokens: 1}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, novel: str) -> Path:
    """A folder with runs of one process and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "book.txt").write_text(novel[:8000])
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "small.yaml", "--train.output_dir=one"])
    script = Path(__file__).with_name("several_processes.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*torchrun, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same_training(run: Path, expected: Path) -> None:
    """Losses to 1e-5 of their size, gradient norms to 1e-4, weights to a tenth of a step's change.

    fp32 sums over rows in another order; AdamW moves a weight by the learning rate (1e-3) a step
    whatever the size of its gradient, so what is rounding in a gradient near zero grows.
    """
    for now, then in zip(steps(run), steps(expected), strict=True):
        assert now["step"] == then["step"]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
    weights = load_file(run / "model" / "model.safetensors")
    for name, then in load_file(expected / "model" / "model.safetensors").items():
        assert (weights[name] - then).abs().max() <= 1e-4, name


def processes(folder: Path, run: str) -> list[dict[str, Any]]:
    """What both processes noted at each checkpoint of a run."""
    notes = [json.loads((folder / f"processes-{rank}.json").read_text()) for rank in (0, 1)]
    return [note for process in notes for note in process[run]]


def test_copies_train_as_one_process(workplace: Path) -> None:
    assert_same_training(workplace / "copied", workplace / "one")
    for process in processes(workplace, "copied"):
        assert process["wrapper"] == "DistributedDataParallel"
        assert process["part_held"] == 1


def test_a_divided_model_trains_as_one_process(workplace: Path) -> None:
    assert_same_training(workplace / "divided", workplace / "one")
    for process in processes(workplace, "divided"):
        assert process["wrapper"] == "FSDPMahaForCausalLM"
        assert process["parameters_are_dtensors"]
        assert process["moments_are_dtensors"]
        assert process["part_held"] == pytest.approx(0.5, abs=0.1)


def test_a_divided_run_resumes_bit_for_bit(workplace: Path) -> None:
    files = [
        json.loads((workplace / run / "checkpoint-12" / "manifest.json").read_text())["files"]
        for run in ("divided", "divided-again")
    ]
    assert files[0] == files[1]


def test_a_checkpoint_of_one_process_continues_in_two(workplace: Path) -> None:
    assert_same_training(workplace / "one-to-several", workplace / "one")


def test_a_checkpoint_of_two_processes_continues_in_one(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    cut_off = shutil.ignore_patterns("model", "checkpoint-12")
    shutil.copytree("divided", "divided-to-one", ignore=cut_off)
    main(["train", "small.yaml", "--resume", "--train.output_dir=divided-to-one"])
    assert_same_training(workplace / "divided-to-one", workplace / "one")
    names = {path.name for path in (workplace / "divided" / "checkpoint-12").iterdir()}
    assert names == {path.name for path in (workplace / "one" / "checkpoint-12").iterdir()}


def test_the_best_weights_of_a_divided_run_are_loaded(workplace: Path) -> None:
    run = workplace / "divided-best"
    state = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())
    best, last = (
        load_file(folder / "model.safetensors")
        for folder in (workplace / state["best_model_checkpoint"], run / "checkpoint-12")
    )
    kept = load_file(run / "model" / "model.safetensors")
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-6"
    for name, weights in kept.items():
        assert weights.equal(best[name])
    assert not all(weights.equal(last[name]) for name, weights in kept.items())


@pytest.mark.parametrize(
    "launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_the_commands_of_the_guide(workplace: Path, checkout: Path, launcher: str) -> None:
    guide = (checkout / "docs" / "distributed.md").read_text().splitlines()
    commands = [line for line in guide if line.startswith(launcher)]
    for i, command in enumerate(commands):
        for four, two in (("_node 4", "_node 2"), ("_processes 4", "_processes 2")):
            command = command.replace(four, two)
        words = command.replace("recipes/demo.yaml", "small.yaml").split()
        place = f"{launcher}-{i}"
        words += [f"--train.output_dir={place}", "--train.per_device_train_batch_size=2"]
        tools = Path(sys.executable).parent
        path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [str(tools / words[0]), *words[1:], "--train.use_cpu=true"],
            cwd=workplace,
            env={**os.environ, **path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert f"run folder {place}; 2 processes" in ended.stdout
        environment = json.loads((workplace / place / "environment.json").read_text())
        assert environment["processes"] == 2
        assert_same_training(workplace / place, workplace / "one")
    assert commands


MISTAKES = [
    ("--train.max_step=1", "did you mean train.max_steps?"),  # before processes know of each other
    ("--data.train=[nowhere.txt]", "'nowhere.txt' does not exist"),
    ("--train.output_dir=one", "run folder one is not empty"),
    ("--resume --train.output_dir=damaged", "cannot resume from damaged/checkpoint-6"),
]
TRY_ALL = """
import sys
from maha_attn.cli import main
codes = []
for mistake in sys.argv[1:]:
    try:
        main(["train", "small.yaml", *mistake.split()])
    except SystemExit as stopped:
        codes.append(stopped.code)
print(codes)
"""


def test_a_mistake_is_told_once_and_ends_all_processes(workplace: Path) -> None:
    cut_off = shutil.ignore_patterns("model", "checkpoint-12")
    shutil.copytree(workplace / "one", workplace / "damaged", ignore=cut_off)
    (workplace / "damaged" / "checkpoint-6" / "model.safetensors").write_bytes(b"cut")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"},
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRY_ALL, *(mistake for mistake, _ in MISTAKES)],
            cwd=workplace,
            env={**os.environ, **launched, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:  # processes that do not hear of each other's end wait for each other
        (first, told), (second, silent) = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert first.splitlines()[-1] == second.strip() == "[2, 2, 2, 2]", told + silent
    lines = [line for line in told.splitlines() if line.startswith("maha train: error: ")]
    for line, (_, message) in zip(lines, MISTAKES, strict=True):
        assert message in line
    for text in (told, silent):
        assert "Traceback" not in text
    assert "error" not in silent


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch --use_fsdp is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch --use_deepspeed is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision bf16 is not what the recipe"),
    ],
)
def test_launchers_do_not_change_the_recipe(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train", "small.yaml", "--train.output_dir=alone"])
    assert message in capsys.readouterr().err
    assert not Path("alone").exists()


def test_one_process_cannot_divide(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit):
        main(["train", "small.yaml", "--train.shard=true", "--train.output_dir=alone"])
    assert "there is one; start several with `torchrun" in capsys.readouterr().err
    assert not Path("alone").exists()
