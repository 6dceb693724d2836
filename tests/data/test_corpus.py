"""From files to rows: no token lost, nothing held out ever seen."""

from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest

from maha_attn.data import corpus
from maha_attn.data.corpus import DataSettings, Texts, make_rows, make_tokenizer, pack, read_texts

BOOK = "".join(f"{i}: the quick brown fox jumps over the lazy dog.\n" for i in range(200))


@pytest.fixture
def book(tmp_path: Path) -> str:
    file = tmp_path / "book.txt"
    file.write_text(BOOK)
    return str(file)


def test_parts_are_disjoint_and_whole(book: str) -> None:
    texts = read_texts(DataSettings(files=[book], held_out=0.2))
    assert texts.train[0] + texts.held_out[0] == BOOK
    assert len(texts.held_out[0]) == pytest.approx(0.2 * len(BOOK), abs=60)


def test_held_out_files_are_whole_and_nothing_is_cut_from_the_others(
    book: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else")
    texts = read_texts(DataSettings(files=[book], held_out_files=[str(other)]))
    assert texts == Texts(train=[BOOK], held_out=["something else"])


def test_tokenizer_learns_from_the_training_part_only() -> None:
    settings = DataSettings(files=["unused"])
    texts = Texts(train=["abababab " * 50], held_out=["xyxyxyxy " * 50])
    learned = set(make_tokenizer(settings, texts, 300).get_vocab())
    assert "abab" in learned
    assert "xy" not in learned


def test_packing_loses_no_token_and_ends_every_document() -> None:
    texts = Texts(train=[BOOK, "café\n"], held_out=["a fox"])
    tokenizer = make_tokenizer(DataSettings(files=["unused"]), texts, 300)
    rows = make_rows(texts, tokenizer, 32)
    for part, documents in ((rows.train, texts.train), (rows.held_out, texts.held_out)):
        expected = [[*tokenizer.encode(document), tokenizer.eos_token_id] for document in documents]
        assert list(chain(*part["input_ids"])) == list(chain(*expected))
        assert {len(row) for row in part["input_ids"][:-1]} <= {32}


def test_packing_is_cached_by_content() -> None:
    texts = Texts(train=[BOOK], held_out=["a fox"])
    tokenizer = make_tokenizer(DataSettings(files=["unused"]), texts, 300)
    first = pack(["one text", BOOK], tokenizer, 16)
    with patch.object(corpus.Tokenizer, "from_str", side_effect=AssertionError("tokenised again")):
        assert pack(["one text", BOOK], tokenizer, 16)["input_ids"] == first["input_ids"]
    changed = pack(["one text.", BOOK], tokenizer, 16)
    assert changed["input_ids"] != first["input_ids"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": []}, "data.files must name at least one"),
        ({"files": ["x"], "held_out": 0.0}, "data.held_out must be between 0 and 1, got 0.0"),
        ({"files": ["x"], "held_out": 1.0}, "data.held_out must be between 0 and 1, got 1.0"),
        ({"files": ["x"], "sequence_length": 1}, "data.sequence_length must be at least 2, got 1"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**settings)


def test_text_too_short_to_split(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abc")
    with pytest.raises(ValueError, match="too short to hold out 10%"):
        read_texts(DataSettings(files=[str(file)]))
