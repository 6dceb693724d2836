"""From documents to rows: no token lost, nothing held out ever seen."""

from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset

from maha_attn.data.corpus import CorpusSettings, load_documents, pack
from maha_attn.data.source import Part
from maha_attn.data.tokenizer import make_tokenizer, train_tokenizer

BOOK = "".join(f"{i}: the quick brown fox jumps over the lazy dog.\n" for i in range(200))
TOKENIZER = train_tokenizer([BOOK], 300)


def documents(*texts: str) -> Part:
    return Part("train", Dataset.from_dict({"text": list(texts)}), [("texts", len(texts))])


def settings(**options: object) -> CorpusSettings:
    return CorpusSettings(**({"train": "unused"} | options))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def book(tmp_path: Path) -> str:
    file = tmp_path / "book.txt"
    file.write_text(BOOK)
    return str(file)


def test_parts_are_disjoint_and_whole(book: str) -> None:
    parts = load_documents(CorpusSettings(train=book, held_out=0.2))
    (train,), (held_out,) = parts["train"].rows["text"], parts["validation"].rows["text"]
    assert train + held_out == BOOK
    assert len(held_out) == pytest.approx(0.2 * len(BOOK), abs=60)


def test_held_out_files_are_whole_and_nothing_is_cut_from_the_others(
    book: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else")
    parts = load_documents(CorpusSettings(train=[book], validation=str(other), test=str(other)))
    texts = {name: part.rows["text"][:] for name, part in parts.items()}
    assert texts == {"train": [BOOK], "validation": ["something else"], "test": ["something else"]}


def test_books_of_the_samples(shared_data: Path) -> None:
    parts = load_documents(
        CorpusSettings(train=str(shared_data / "books" / "validation.jsonl.gz"), limit=2)
    )
    assert len(parts["train"].rows) == 2
    assert all(len(text) > 50_000 for text in parts["train"].rows["text"])


@pytest.mark.parametrize("length", [2, 32, 10**6])
def test_packing_loses_no_token_and_ends_every_document(length: int) -> None:
    texts = [BOOK, "café\n", "a fox"]
    rows = pack(documents(*texts), TOKENIZER, settings(sequence_length=length))
    expected = [[*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for text in texts]
    assert list(chain(*rows["input_ids"])) == list(chain(*expected))
    assert {len(row) for row in rows["input_ids"][:-1]} <= {length}


def test_what_is_held_out_is_cached_by_content(book: str) -> None:
    options = CorpusSettings(train=book, sequence_length=16)

    def packed() -> dict[str, float]:
        rows = pack(load_documents(options)["validation"], TOKENIZER, options)
        files = [file["filename"] for file in rows.cache_files]
        return {file: Path(file).stat().st_mtime for file in files}

    first = packed()
    assert first
    assert packed() == first
    Path(book).write_text(BOOK + "more")
    assert not packed().keys() & first.keys()


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert make_tokenizer(str(tmp_path), [], 999).get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": []}, "data.train must name at least one"),
        ({"held_out": 0.0}, "data.held_out must be between 0 and 1, got 0.0"),
        ({"held_out": 1.0}, "data.held_out must be between 0 and 1, got 1.0"),
        ({"sequence_length": 1}, "data.sequence_length must be at least 2, got 1"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", r"short\.txt, row 1: is too short to hold out 10%"),
        (" \n", "field 'text': is empty"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_documents(CorpusSettings(train=str(file)))
