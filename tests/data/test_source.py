"""Loading: every format and the hub's layout give the same rows; every defect is told in a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from maha_attn.data.source import SourceSettings, load_part, load_parts

ROWS = [
    {"sentence": "a fine film", "label": 1},
    {"sentence": "naïve, dull", "label": 0},
    {"sentence": "so so", "label": 0},
]
COLUMNS = {"text": "sentence", "label": "label"}
Write = Callable[[str, list[dict[str, Any]]], str]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
def test_formats_agree(write: Write, name: str) -> None:
    part = load_part(SourceSettings(train=write(name, ROWS)), "train", COLUMNS)
    assert part is not None
    expected = [{"text": row["sentence"], "label": row["label"]} for row in ROWS]
    assert part.rows.to_list() == expected


def test_a_dataset_of_the_hub(tmp_path: Path, hub_folder: Callable[..., Path]) -> None:
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])}
    )
    rows = Dataset.from_list(ROWS, features=features)
    splits = {"train": rows, "validation": rows.select([1])}
    hub_folder(tmp_path / "glue", {"sst2": splits})
    settings = SourceSettings(
        dataset=str(tmp_path / "glue"), config="sst2", train="train[:2]", validation="validation"
    )
    parts = load_parts(settings, COLUMNS)
    assert parts["train"].rows["text"][:] == ["a fine film", "naïve, dull"]
    assert parts["train"].rows.features["label"].names == ["negative", "positive"]
    assert parts["validation"].rows.to_list() == [{"text": "naïve, dull", "label": 0}]
    assert "test" not in parts


def test_columns_inside_columns(write: Write) -> None:
    rows = [{"translation": {"de": "ja", "en": "yes"}}, {"translation": {"de": "nein", "en": "no"}}]
    columns = {"source": "translation.en", "target": "translation.de"}
    part = load_part(SourceSettings(train=write("wmt.jsonl", rows)), "train", columns)
    assert part is not None
    assert part.rows[1] == {"source": "no", "target": "nein"}


def test_a_row_is_named_by_its_file(write: Write) -> None:
    files = [write(name, ROWS[:2]) for name in ("a.jsonl", "b.csv", "c.parquet", "d.json")]
    part = load_part(SourceSettings(train=files), "train", COLUMNS)
    assert part is not None
    places = [f"{file}, row {row}" for file in files for row in (1, 2)]
    assert [part.where(i) for i in range(8)] == places


def test_limit_takes_the_first(write: Write) -> None:
    part = load_part(SourceSettings(train=write("a.jsonl", ROWS), limit=2), "train", COLUMNS)
    assert part is not None
    assert part.rows["label"][:] == [1, 0]


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    text = "one\n\ntwo \n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b").write_text("three")
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b")]
    part = load_part(SourceSettings(train=names), "train", {"text": "text"})
    assert part is not None
    assert part.rows["text"][:] == [text, "three"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"sentence": "é", "label": 1}', "a.jsonl", r"a\.jsonl' is not UTF-8: byte 15 of line 1"),
        ("sentence,label\né,1\n", "a.csv", r"a\.csv' is not UTF-8: byte 1 of line 2"),
        ("é", "a.txt", r"a\.txt' is not UTF-8: byte 1 of line 1"),
        ('{"sentence": "a"}\n{"sentence": "b"', "a.jsonl",
         r"a\.jsonl' cannot be read as json: what begins in line 2 is no JSON: Expecting ',' "),
        ('{"a": 1}\n{"a": 1, "a": 2}', "a.jsonl",
         r"cannot be read as json: JSON parse error: Column\(/a\) was specified twice$"),
        ("sentence,label\na,1\nb,2,3\n", "a.csv",
         r"a\.csv' cannot be read as csv: .*Expected 2 fields in line 3, saw 3$"),
        ('sentence,label\na,1\n"b,2\n', "a.csv",
         r"a\.csv' cannot be read as csv: .*EOF inside string starting at line 3$"),
        ("a\0b", "a.xlsx", r"a\.xlsx' is no text: .*expected text \(\.txt .*\.jsonl"),
        ("", "a.jsonl", r"a\.jsonl' is empty; expected examples"),
        ("sentence,label\n", "a.csv", r"a\.csv' is empty; expected examples"),
        ("no parquet", "a.parquet", r"a\.parquet' cannot be read as parquet"),
        ('{"text": "a", "label": 1}', "a.jsonl", r"a\.jsonl \(data\.train\) has no column "
         r"'sentence' \(data\.columns names them\); it has text, label"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        load_part(SourceSettings(train=str(tmp_path / name)), "train", COLUMNS)


def test_other_bytes_that_arrow_takes(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes('{"text": "good"}\n{"text": "café"}\n'.encode("latin1"))
    hub = SourceSettings(dataset=str(folder), train="train")
    column = pa.array([b"good", "café".encode("latin1")], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    file = SourceSettings(train=str(tmp_path / "a.parquet"))
    for settings, place in ((hub, "films train"), (file, r"a\.parquet")):
        with pytest.raises(ValueError, match=f"{place}, row 2, field 'text': expected UTF-8"):
            load_part(settings, "train", {"text": "text"})


def test_files_that_do_not_agree(write: Write) -> None:
    files = [write("a.jsonl", ROWS), write("b.jsonl", [{"sentence": "a", "label": "good"}])]
    with pytest.raises(ValueError, match=r"b\.jsonl \(data\.train\) do not agree"):
        load_part(SourceSettings(train=files), "train", COLUMNS)


def test_bad_datasets(tmp_path: Path, hub_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing', split 'train' .*can be reached"):
        load_part(SourceSettings(dataset="nobody/nothing", train="train"), "train", COLUMNS)
    folder = hub_folder(tmp_path / "glue", {"sst2": {"train": Dataset.from_list(ROWS)}})
    with pytest.raises(ValueError, match=r"split 'dev' \(data\.train\): Unknown split"):
        load_part(SourceSettings(dataset=str(folder), train="dev"), "train", COLUMNS)
    other = SourceSettings(dataset=str(folder), config="mnli", train="train")
    with pytest.raises(ValueError, match=r"BuilderConfig 'mnli' not found"):
        load_part(other, "train", COLUMNS)
    csv = tmp_path / "csv"
    csv.mkdir()
    (csv / "train.csv").write_bytes("sentence,label\nsch\u00f6n,good\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"split 'train' \(data\.train\) cannot be read: .*utf-8"):
        load_part(SourceSettings(dataset=str(csv), train="train"), "train", COLUMNS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a"}, {"sentence": " \n"}], r"row 2, field 'sentence': is empty"),
        (
            [{"sentence": "a"}, {"sentence": None}],
            r"row 2, field 'sentence': expected text, got None",
        ),
        ([{"sentence": 5}], r"row 1, field 'sentence': expected text, got 5"),
    ],
)
def test_require_text(write: Write, rows: list[dict[str, Any]], message: str) -> None:
    part = load_part(SourceSettings(train=write("a.jsonl", rows)), "train", {"text": "sentence"})
    assert part is not None
    with pytest.raises(ValueError, match=message):
        part.require_text("text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, "data.train must name at least one"),
        ({"train": "a", "num_proc": 0}, "data.num_proc must be at least 1, got 0"),
        ({"train": "a", "limit": 0}, "data.limit must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings(**settings)
