"""Small runs in the test's own process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maha_attn.cli import main

MODEL = (
    "{vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_scales: 2, window: 8}"
)
TRAIN = (
    "{max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-3, logging_steps: 1, "
    "save_steps: 2, use_cpu: true, report_to: none, disable_tqdm: true}"
)
CPU = ("--train.use_cpu=true", "--train.disable_tqdm=true", "--train.report_to=[none]")

Train = Callable[..., dict[str, Any]]
Mistake = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data, their recipes, and a run of masked language modelling."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [("good film", 1), ("bad film", 0), ("a very good one", 1), ("so very bad", 0)] * 4
    write(folder / "sst.jsonl", [{"text": text, "label": label} for text, label in texts])
    pairs = [{"en": f"a dog {i}", "de": f"ein Hund {i}"} for i in range(12)]
    write(folder / "ende.jsonl", pairs)
    context = "The café stood by the river. It closed in 1912."
    answers = {"1912": [42], "the river": [18]}
    questions = [("When did it close?", "1912"), ("Where was it?", "the river"), ("Whose?", "")] * 3
    spans = [
        {
            "question": question,
            "context": context,
            "answers": {"text": [text] * bool(text), "answer_start": answers.get(text, [])},
        }
        for question, text in questions
    ]
    write(folder / "qa.jsonl", spans)
    (folder / "book.txt").write_text("The cat sat on the mat; the dog did not.\n" * 60)
    recipes = {
        "mlm": "task: masked_language_modeling\ndata: {train: book.txt, sequence_length: 32}",
        "sst": "task: sequence_classification\ndata: {train: sst.jsonl, validation: sst.jsonl}",
        "qa": "task: question_answering\n"
        "data: {train: qa.jsonl, validation: qa.jsonl, max_length: 64, stride: 8}",
        "ende": "task: translation\n"
        "data: {train: ende.jsonl, validation: ende.jsonl, columns: {source: en, target: de}}\n"
        "generation: {temperature: 0, max_new_tokens: 5, prompt: a dog}",
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(f"{text}\nmodel: {MODEL}\ntrain: {TRAIN}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "mlm.yaml"])
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def train(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train in a run folder of the test's own; returns what evaluation found."""
    monkeypatch.chdir(place)

    def train(recipe: str, *arguments: str) -> dict[str, Any]:
        run = tmp_path / "run"
        main(["train", recipe, f"--train.output_dir={run}", *arguments])
        found = run / "evaluation.json"
        return json.loads(found.read_text()) if found.exists() else {}

    return train


@pytest.fixture
def mistake(train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Mistake:
    """Train, which must fail with one line before a run folder is made; returns the line."""

    def mistake(recipe: str, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train(recipe, *arguments)
        assert stopped.value.code == 2
        assert not (tmp_path / "run").exists()
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("maha train: error: ")
        return line

    return mistake
