"""Run folders that others made: no code of theirs is run, and what cannot be used is told."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maha_attn.cli import main

from .conftest import Train

BESIDE = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "optimizer.pt"),
    *("scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "generation_config.json"),
]
"""Files that other programs leave in such folders, most of them pickled."""
ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["down"]}


class Given:
    """A copy of a run, and a way to use it."""

    def __init__(self, way: str, run: Path, train: Train) -> None:
        self.way, self.run, self.model, self.train = way, run, run / "model", train

    def change(self, name: str, **values: Any) -> None:
        """Change a JSON file of the model."""
        file = self.model / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | values))

    def use(self) -> Any:
        """Evaluate it, have it write text or start from it; what came of that."""
        if self.way == "generate":
            return main(["generate", str(self.run), "a dog"])
        if self.way == "eval":
            main(["eval", str(self.run)])
            return json.loads((self.run / "evaluation.json").read_text())
        self.train("sst.yaml", "--overwrite", "--pretrained", str(self.run))
        return (self.run.with_name("run") / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The folder of runs/mlm and of runs/ende, which writes text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["train", "ende.yaml"])
    return place / "runs"


@pytest.fixture(params=["eval", "generate", "pretrained"])
def given(request: Any, runs: Path, train: Train, tmp_path: Path) -> Given:
    run = runs / ("ende" if request.param == "generate" else "mlm")
    return Given(request.param, Path(shutil.copytree(run, tmp_path / "given")), train)


@pytest.fixture
def refused(given: Given, trap: Any, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Use it, which must fail with one line; returns the line."""

    def refused() -> str:
        with pytest.raises(SystemExit) as stopped:
            given.use()
        assert stopped.value.code == 2
        assert not trap.sprung
        assert not given.run.with_name("run").exists()  # nothing was begun
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def code(trace: Path) -> str:
    """A module that leaves a trace when it is imported."""
    return f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Thing: ...\n"


def test_what_lies_beside_is_not_looked_at(
    given: Given, trap: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome() -> tuple[Any, str]:
        capsys.readouterr()
        found = given.use()
        return found, capsys.readouterr().out if given.way == "generate" else ""

    expected = outcome()
    for name in BESIDE:
        trap.set(given.run / name)
        trap.set(given.model / name)
    (given.model / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py"):
        (given.model / name).write_text(code(trap.trace))
    classes = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
    given.change("config.json", auto_map=dict.fromkeys(classes, "code.Thing"))
    given.change("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Thing", "code.Thing"]})
    given.change("adapter_config.json", **ADAPTER, base_model_name_or_path=str(given.model))
    assert outcome() == expected
    assert not trap.sprung


def test_code_of_another_kind_of_model_is_not_asked_for(
    given: Given, trap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    (given.model / "code.py").write_text(code(trap.trace))
    given.change("config.json", model_type="other", auto_map={"AutoConfig": "code.Thing"})
    with suppress(SystemExit):  # --pretrained refuses another kind; the others don't look at it
        given.use()
    assert not asked
    assert not trap.sprung


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is damaged or no safetensors file"),
        ("config.json", "config.json' is not a valid JSON file"),
        ("tokenizer.json", "model' cannot be read: "),
        ("tokenizer_config.json", "model' cannot be read: "),
    ],
)
def test_a_pickle_in_the_place_of_a_file(
    given: Given, trap: Any, refused: Callable[[], str], name: str, message: str
) -> None:
    trap.set(given.model / name)
    assert message in refused()


def test_weights_that_are_pickled_only(given: Given, trap: Any, refused: Callable[[], str]) -> None:
    (given.model / "model.safetensors").unlink()
    trap.set(given.model / "pytorch_model.bin")
    assert "pytorch_model.bin is pickled, and unpickling it may run any code" in refused()


def test_a_recipe_that_is_none(given: Given, trap: Any, refused: Callable[[], str]) -> None:
    if given.way == "pretrained":
        pytest.skip("its recipe is not read")
    trap.set(given.run / "recipe.yaml")
    assert "recipe.yaml is damaged: " in refused()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lose(file: Path) -> None:
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file)


def rename(file: Path) -> None:
    weights = load_file(file)
    weights["other.weight"] = torch.zeros(1)
    save_file(weights, file)


def shrink(file: Path) -> None:
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors is damaged or no safetensors file"),
        (lose, "1 of the weights that its config.json describes, model.norm.weight first"),
        (rename, "are not those of a MahaForMaskedLM: other.weight is unexpected (of 1 such)"),
        (shrink, "1 of the weights that its config.json describes, model.norm.weight first"),
    ],
)
@pytest.mark.parametrize("given", ["eval"], indirect=True)
def test_weights_that_are_not_the_models(
    given: Given, refused: Callable[[], str], damage: Callable[[Path], None], message: str
) -> None:
    damage(given.model / "model.safetensors")
    assert message in refused()
