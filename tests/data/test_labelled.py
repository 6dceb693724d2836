"""Labelled texts: numbers for labels, rows of tokens, and every wrong row named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from maha_attn.data.labelled import LabelledColumns, LabelledSettings, encode, load_labelled
from maha_attn.data.tokenizer import train_tokenizer

Write = Callable[[str, list[dict[str, Any]]], str]
NLI = [
    {"premise": "it rains", "hypothesis": "it is wet", "label": "entailment"},
    {"premise": "it rains", "hypothesis": "it is dry", "label": "contradiction"},
    {"premise": "it rains", "hypothesis": "it is May", "label": "neutral"},
]
SST = [{"text": "good", "label": 1}, {"text": "bad, very bad", "label": 0}]
TOKENIZER = train_tokenizer(["it rains it is wet good bad very " * 9], 300, framed=True)


def test_names_become_numbers_in_the_given_order(write: Write) -> None:
    file = write("a.jsonl", NLI)
    names = ["entailment", "neutral", "contradiction"]
    columns = LabelledColumns(text="premise", pair="hypothesis")
    settings = LabelledSettings(train=file, validation=file, columns=columns, labels=names)
    labelled = load_labelled(settings)
    assert labelled.labels == names
    assert labelled.parts["train"].rows["label"][:] == [0, 2, 1]
    assert sorted(set(labelled.texts())) == ["it is May", "it is dry", "it is wet", "it rains"]


def test_labels_of_the_training_part(write: Write) -> None:
    file = write("a.jsonl", NLI)
    columns = LabelledColumns(text="premise")
    named = LabelledSettings(train=file, validation=file, columns=columns)
    assert load_labelled(named).labels == ["contradiction", "entailment", "neutral"]
    numbered = write("b.jsonl", [*SST, {"text": "so so", "label": 2}])
    assert load_labelled(LabelledSettings(train=numbered, validation=numbered)).labels == [
        *("0", "1", "2")
    ]


def test_labels_of_a_dataset(write: Write, tmp_path: Any) -> None:
    names = ClassLabel(names=["negative", "positive"])
    rows = Dataset.from_list(SST, features=Features({"text": Value("string"), "label": names}))
    rows.to_parquet(tmp_path / "a.parquet")
    file = str(tmp_path / "a.parquet")
    labelled = load_labelled(LabelledSettings(train=file, validation=file))
    assert labelled.labels == ["negative", "positive"]
    assert labelled.parts["validation"].rows["label"][:] == [1, 0]


def test_rows_of_tokens(write: Write) -> None:
    file = write("a.jsonl", NLI)
    columns = LabelledColumns(text="premise", pair="hypothesis")
    settings = LabelledSettings(train=file, validation=file, columns=columns)
    rows = encode(load_labelled(settings).parts["train"], TOKENIZER, settings)
    assert rows[1]["input_ids"] == TOKENIZER("it rains", "it is dry").input_ids
    assert rows[1]["label"] == 0
    assert rows["length"][:] == [len(ids) for ids in rows["input_ids"]]


def test_long_rows_are_refused_or_cut(write: Write) -> None:
    file = write("a.jsonl", [*SST, {"text": "long " * 50, "label": 1}])
    settings = LabelledSettings(train=file, validation=file, max_length=16)
    part = load_labelled(settings).parts["train"]
    with pytest.raises(
        ValueError, match=r"row 3, field 'text': the row has \d+ tokens .*data\.trunc"
    ):
        encode(part, TOKENIZER, settings)
    cut = LabelledSettings(train=file, validation=file, max_length=16, truncate=True)
    rows = encode(part, TOKENIZER, cut)
    assert max(rows["length"]) == 16
    assert rows[2]["input_ids"][-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, "expected one of 0, 1, or a number from 0 to 1; got 2"),
        (-1, "got -1; a part whose labels are hidden cannot be scored"),
        ("positive", "got 'positive'"),
        (None, "got None"),
        (1.5, "got 1.5"),
        (True, "got True"),
    ],
)
def test_bad_labels(write: Write, label: Any, message: str) -> None:
    train = write("train.jsonl", SST)
    dev = write("dev.jsonl", [{"text": "b", "label": label}])
    with pytest.raises(ValueError, match=r"dev\.jsonl, row 1, field 'label'") as error:
        load_labelled(LabelledSettings(train=train, validation=dev))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 9), "row 3, .*one of 0, 1, 2, .*; got 9; data.labels names the classes"),
        ((0, 900_000), "row 2, .*; got 900000; data"),
        ((0, 0), "row 1, .*expected two or more classes, got 0 in every row"),
        ((None, None), "row 1, .*expected a number from 0 or a name of a class, got None"),
        (([1], [0]), r"row 1, .*got \[1\]"),
        ((1, "good"), "row 2, .*expected numbers or names alone, got 1 and 'good'"),
    ],
)
def test_bad_labels_where_none_are_named(write: Write, labels: Any, message: str) -> None:
    file = write("a.jsonl", [{"text": "a", "label": label} for label in labels])
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        load_labelled(LabelledSettings(train=file, validation=file))


def test_a_missing_label_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,1\nso,\nbad,0\n")
    file = str(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.csv, row 2, field 'label': .*got None"):
        load_labelled(LabelledSettings(train=file, validation=file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": []}, "data.validation must name at least one"),
        ({"max_length": 3}, "data.max_length must be at least 4, got 3"),
        ({"labels": ["a"]}, r"data.labels must name two or more classes once, got \['a'\]"),
        ({"labels": ["a", "b", "a"]}, "data.labels must name two or more classes once"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledSettings(**({"train": "a", "validation": "b"} | options))
