"""The data sets of the hub, in small copies of their layout and features, by the recipes' words.

Each recipe says which options take its data from the hub. Here they are read out of the recipe and
used as they stand: a relative folder of that name is found before the hub is asked.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Translation, Value

from maha_attn.cli import main

CPU = ("--train.use_cpu=true", "--train.disable_tqdm=true", "--train.report_to=[none]")
TEXTS = ["a fine film", "a dull one", "so very good", "it is not bad", "good fun", "bad, bad, bad"]
SST2 = Features(
    {
        "sentence": Value("string"),
        "label": ClassLabel(names=["negative", "positive"]),
        "idx": Value("int32"),
    }
)
MNLI = Features(
    {
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
        "idx": Value("int32"),
    }
)
WMT14 = Features({"translation": Translation(languages=["de", "en"])})
SQUAD = Features(
    {
        **{name: Value("string") for name in ("id", "title", "context", "question")},
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
PG19 = Features(
    {
        "short_book_title": Value("string"),
        "publication_date": Value("int32"),
        "url": Value("string"),
        "text": Value("string"),
    }
)


def sst2(label: int | None = None) -> Dataset:
    """Sentences; those of the test split are all labelled -1."""
    rows = [{"sentence": t, "label": i % 2, "idx": i} for i, t in enumerate(TEXTS * 2)]
    return Dataset.from_list(
        [row if label is None else row | {"label": label} for row in rows], features=SST2
    )


def mnli(label: int | None = None) -> Dataset:
    """Pairs; those of the test splits are all labelled -1."""
    rows = [
        {"premise": t, "hypothesis": f"{t}?", "label": i % 3 if label is None else label, "idx": i}
        for i, t in enumerate(TEXTS * 2)
    ]
    return Dataset.from_list(rows, features=MNLI)


def wmt14() -> Dataset:
    """Pairs as one column that holds both."""
    pairs = [{"translation": {"de": f"Hund Nummer {i}", "en": f"dog number {i}"}} for i in range(9)]
    return Dataset.from_list(pairs, features=WMT14)


def squad() -> Dataset:
    """Questions; every third has no answer."""
    context = "The café stood by the river. It closed in 1912."
    rows, asked = [], [("When?", "1912"), ("Where?", "river"), ("Who?", "")] * 3
    for i, (question, text) in enumerate(asked):
        answers = {
            "text": [text] * bool(text),
            "answer_start": [context.index(text)] * bool(text),
        }
        row = {"id": str(i), "title": "Café", "context": context, "question": question}
        rows.append(row | {"answers": answers})
    return Dataset.from_list(rows, features=SQUAD)


def pg19() -> Dataset:
    """Whole books."""
    books = [f"{n} foxes jump over {n} lazy dogs. " * 60 for n in ("Two", "Five", "Nine")]
    rows = [
        {"short_book_title": "Foxes", "publication_date": 1900, "url": "http://…", "text": text}
        for text in books
    ]
    return Dataset.from_list(rows, features=PG19)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_folder: Callable[..., Path]) -> Path:
    """A folder in which the names of the hub are found."""
    hub_folder(
        tmp_path / "nyu-mll" / "glue",
        {
            "sst2": {"train": sst2(), "validation": sst2(), "test": sst2(-1)},
            "mnli": {
                "train": mnli(),
                **{f"validation_{kind}": mnli() for kind in ("matched", "mismatched")},
                **{f"test_{kind}": mnli(-1) for kind in ("matched", "mismatched")},
            },
        },
    )
    parts = ("train", "validation", "test")
    hub_folder(tmp_path / "wmt" / "wmt14", {"de-en": {part: wmt14() for part in parts}})
    hub_folder(
        tmp_path / "rajpurkar" / "squad_v2",
        {"squad_v2": {part: squad() for part in parts[:2]}},
    )
    # The branch that the hub converts to parquet declares nothing; of what is large it has a part.
    for folder in ("partial-train", "validation", "test"):
        place = tmp_path / "deepmind" / "pg19" / "default" / folder
        place.mkdir(parents=True)
        pg19().to_parquet(place / "0000.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hub_options(checkout: Path, recipe: str) -> list[str]:
    """The options that the recipe's comment gives to take its data from the hub."""
    text = (checkout / "recipes" / f"{recipe}.yaml").read_text()
    comment = re.match(r"(#.*\n)+", text)
    assert comment
    options = re.findall(r"--data\.\S+", comment[0])
    assert options
    return options


Check = Callable[[dict[str, Any]], bool]


@pytest.mark.parametrize(
    ("recipe", "check"),
    [
        ("sst2", lambda found: found["labels"] == ["negative", "positive"]),
        (
            "mnli",
            lambda found: (
                found["labels"] == ["entailment", "neutral", "contradiction"]
                and "accuracy" in found["metrics"]["test"]
            ),
        ),
        (
            "translation",
            lambda found: (
                found["samples"][0]["source"] == "dog number 0"
                and found["samples"][0]["reference"] == "Hund Nummer 0"
            ),
        ),
        (
            "squad",
            lambda found: (
                {"has_answer_f1", "no_answer_exact"} <= set(found["metrics"]["validation"])
            ),
        ),
    ],
)
def test_the_recipes_words_take_the_hubs_data(
    recipe: str, check: Check, hub: Path, checkout: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*hub_options(checkout, recipe), *CPU, f"--train.output_dir={run}"]
    main(["train", f"recipes/{recipe}.yaml", "--variant", "smoke", *options])
    assert check(json.loads((run / "evaluation.json").read_text()))


def test_books_of_the_hub(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--data.num_proc=2", *CPU, f"--train.output_dir={run}"]
    main(["train", "recipes/lm_books.yaml", "--variant", "smoke", "--variant", "pg19", *options])
    found = json.loads((run / "evaluation.json").read_text())
    assert "bits_per_byte" in found["metrics"]["test"]
    assert "of 3 document(s) to train on" in capsys.readouterr().out


def test_hidden_labels_are_refused(
    hub: Path, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*hub_options(checkout, "sst2"), "--data.test=test", *CPU]
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["train", "recipes/sst2.yaml", *options, f"--train.output_dir={run}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "nyu-mll/glue test, row 1, field 'label'" in line
    assert "a part whose labels are hidden cannot be scored" in line
    assert not run.exists()
