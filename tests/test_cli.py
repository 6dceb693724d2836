"""The command line: a small run from recipe to text, and one clear line for every mistake."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from maha_attn.cli import main
from maha_attn.data.files import find_files

RECIPE = """
model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
        num_attention_heads: 2, num_scales: 3, window: 8}
data: {train: [book.txt], sequence_length: 64}
train: {max_steps: 4, per_device_train_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1,
        save_steps: 2, use_cpu: true, report_to: none, disable_tqdm: true}
generation: {prompt: Alice, max_new_tokens: 8}
"""

Maha = Callable[..., str]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its text, and the run that came of it."""
    folder = tmp_path_factory.mktemp("cli")
    (novel,) = find_files("embedded:alice_in_wonderland")
    (folder / "book.txt").write_text(gzip.decompress(novel.read_bytes()).decode()[:20_000])
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "small.yaml"])
    return folder


@pytest.fixture
def maha(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Maha:
    """Run the command in the workplace; returns what it printed."""
    monkeypatch.chdir(workplace)

    def run(*arguments: str) -> str:
        main(list(arguments))
        return capsys.readouterr().out

    return run


@pytest.fixture
def mistake(maha: Maha, capsys: pytest.CaptureFixture[str]) -> Maha:
    """Run the command, which must fail with one line; returns the line."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            maha(*arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"maha {arguments[0]}: error: ")
        return line

    return run


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_run_folder(workplace: Path) -> None:
    run = workplace / "runs" / "small"
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    assert settings["model"]["window"] == 8
    assert settings["model"]["fusion"] == "convex"  # what the recipe leaves out is there too
    assert settings["train"]["adam_beta1"] == 0.9
    assert settings["evaluation"]["stride"] is None
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert {"commit", "command", "device_name", "python", "seed"} <= set(environment)
    assert steps(run) == [1, 2, 3, 4]
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "scales.png"),
        *("checkpoint-2", "checkpoint-4", "model"),
    }
    assert (run / "scales.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((run / "evaluation.json").read_text())
    assert [layer["layer"] for layer in result["scale_usage"]] == [0, 1]
    for head in result["scale_usage"][0]["weights"]:
        assert sum(head) == pytest.approx(1, abs=1e-5)


def test_nothing_in_the_run_folder_is_pickled(workplace: Path) -> None:
    files = [path for path in (workplace / "runs" / "small").rglob("*") if path.is_file()]
    assert {file.suffix for file in files} == {".yaml", ".json", ".jsonl", ".png", ".safetensors"}


def test_eval_repeats_what_training_found(maha: Maha, workplace: Path) -> None:
    file = workplace / "runs" / "small" / "evaluation.json"
    after_training = json.loads(file.read_text())
    printed = maha("eval", "runs/small")
    assert json.loads(file.read_text()) == after_training
    perplexity = after_training["perplexities"]["unigram"]["perplexity"]
    assert f"{perplexity:.2f}" in printed
    assert "runs/small/scales.png" in printed
    maha("eval", "runs/small", "--stride=32")
    strided = json.loads(file.read_text())
    assert strided["settings"]["stride"] == 32
    assert strided["held_out"]["tokens"] > after_training["held_out"]["tokens"]


def test_generate(maha: Maha) -> None:
    text = maha("generate", "runs/small", "The Queen")
    assert text.startswith("The Queen")
    assert len(text) > len("The Queen\n")
    assert maha("generate", "runs/small", "The Queen") == text
    assert maha("generate", "runs/small", "The Queen", "--seed=1") != text
    greedy = ("generate", "runs/small", "The Queen", "--temperature=0")
    assert maha(*greedy, "--seed=1") == maha(*greedy, "--seed=2")


def test_overwrite_replaces_a_run_and_nothing_else(maha: Maha, mistake: Maha) -> None:
    short = ("--train.max_steps=1", "--train.output_dir=runs/again")
    maha("train", "small.yaml", *short)
    assert "--overwrite" in mistake("train", "small.yaml", *short)
    Path("runs/again/leftover").touch()
    maha("train", "small.yaml", "--overwrite", *short)
    assert not Path("runs/again/leftover").exists()
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    line = mistake("train", "small.yaml", "--overwrite", "--train.output_dir=mine")
    assert "is no run folder" in line
    assert Path("mine/thesis.tex").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: {hiden_size: 8}\ndata: {train: [book.txt]}", "did you mean model.hidden_size?"),
        ("data: {train: [book.txt], held_outt: 1}", "did you mean data.held_out?"),
        ("data: {train: [book.txt]}\ntrain: {max_step: 1}", "did you mean train.max_steps?"),
        ("modle: {}\ndata: {train: [book.txt]}", "seeds, variants; got modle"),
        ("model: {hidden_size: 32}", "data.train"),
        ("data: {train: [book.txt]}\nmodel: {window: 0}", "window must be at least 1, got 0"),
        ("data: {train: [book.txt], sequence_length: x}", "data.sequence_length"),
        ("data: {train: [nowhere.txt]}", "'nowhere.txt' does not exist"),
        ("data: {train: [empty.txt]}", "'empty.txt' is empty"),
        ("data: {train: [latin.txt]}", "'latin.txt' is not UTF-8: byte 1 of line 1 is 0xe9"),
        ("data: {train: [book.txt], tokenizer: nowhere}", "'nowhere' has no tokenizer.json"),
        ("data: {train: [book.txt]}\nmodel: {vocab_size: 100}", "vocab_size must be at least 258"),
        ("data: [", "bad.yaml"),
        ("", "bad.yaml: expected YAML with the sections model, data"),
        ("data: {train: [book.txt]}\nevaluation: {stride: 512}", "evaluation.stride must be"),
    ],
)
def test_bad_recipe(mistake: Maha, workplace: Path, recipe: str, message: str) -> None:
    (workplace / "empty.txt").touch()
    (workplace / "latin.txt").write_bytes("été".encode("latin1"))
    (workplace / "bad.yaml").write_text(recipe)
    assert message in mistake("train", "bad.yaml", "--train.output_dir=runs/bad")
    assert not (workplace / "runs" / "bad").exists()


def test_too_little_text(maha: Maha, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "tiny.txt").write_text("a b c d e")
    with pytest.raises(SystemExit):
        maha("train", "small.yaml", "--data.train=[tiny.txt]", "--train.output_dir=runs/tiny")
    *_, line = capsys.readouterr().err.splitlines()  # behind the bars of what had to be read
    assert "data.train holds 6 tokens, less than one row of" in line
    assert not (workplace / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nowhere.yaml", "recipe nowhere.yaml: it does not exist"),
        ("train --overwrite small.yaml", "expected the recipe first, got --overwrite"),
        ("train small.yaml --train.max_step=1", "did you mean train.max_steps?"),
        ("train small.yaml --overwrite --resume", "not allowed with"),
        ("train small.yaml --overwrite --train.fsdp=full_shard", "use train.shard=true"),
        ("train small.yaml --resume --train.output_dir=runs/none", "no run folder to resume from"),
        ("train small.yaml --resume --model.window=9", "model.window was 8 there and is 9 now"),
        ("eval nowhere", "nowhere is no run folder: it does not exist"),
        ("eval .", "is no run folder: it has no recipe.yaml"),
        ("eval runs/small --stride=64", "evaluation.stride must be between 1 and"),
        ("generate runs/small", "prompt"),
        ("generate runs/small text --temprature=1", "--temprature=1"),
    ],
)
def test_bad_arguments(mistake: Maha, arguments: str, message: str) -> None:
    assert message in mistake(*arguments.split())


def test_a_harness_that_is_not_installed(mistake: Maha, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "maha_attn.evaluation.harness", raising=False)
    monkeypatch.delattr("maha_attn.evaluation.harness", raising=False)
    line = mistake("eval", "runs/small", "--harness_tasks=[arc_easy]")
    assert "lm_eval is not installed; pip install 'maha-attn[lm_eval]'" in line


def test_unfinished_run(mistake: Maha, workplace: Path, tmp_path: Path) -> None:
    shutil.copy(workplace / "runs" / "small" / "recipe.yaml", tmp_path)
    assert "its training did not end" in mistake("generate", str(tmp_path), "text")


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_help_teaches(maha: Maha, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        maha(command, "--help")
    assert not stopped.value.code
    assert f"  maha {command} " in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "shown", "hidden"),
    [
        ("eval --help", "--stride STRIDE", "--max_answer_tokens "),
        ("eval --help question_answering", "--max_answer_tokens ", "stride STRIDE"),
        ("eval runs/small --help", "--stride STRIDE", "--max_answer_tokens "),
        ("generate runs/small --help", "Tokens to add. (type: int, default: 8)", "default: 100"),
        ("train --help question_answering", "--evaluation.max_answer_tokens ", "evaluation.stride"),
        ("train small.yaml --help", "--evaluation.stride ", "--train.deepspeed "),
    ],
)
def test_help_is_of_a_task(
    maha: Maha, capsys: pytest.CaptureFixture[str], arguments: str, shown: str, hidden: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        maha(*arguments.split())
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert shown in text
    assert hidden not in text


def test_version(maha: Maha, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        maha("--version")
    assert not stopped.value.code
    line = capsys.readouterr().out
    assert line.startswith(f"maha-attn {version('maha-attn')} (torch {version('torch')}")


def test_demo_recipe_is_found_from_anywhere(maha: Maha, mistake: Maha, workplace: Path) -> None:
    line = mistake("train", "recipes/demo.yaml", "--data.train=[nowhere.txt]")
    assert "'nowhere.txt' does not exist" in line


def test_installed_command() -> None:
    command = [str(Path(sys.executable).with_name("maha")), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "maha COMMAND --help" in found.stdout
