"""Pairs of sentences: both sides in tokens, wmt14's nested columns, long sides refused."""

from collections.abc import Callable
from typing import Any

import pytest

from maha_attn.data.parallel import ParallelColumns, ParallelSettings, encode, load_parallel, texts
from maha_attn.data.tokenizer import train_tokenizer

Write = Callable[[str, list[dict[str, Any]]], str]
ROWS = [
    {"translation": {"de": "Ein Hund läuft.", "en": "A dog runs."}},
    {"translation": {"de": "Guten Tag, sagte der sehr freundliche Mann.", "en": "Hello."}},
]
TOKENIZER = train_tokenizer(["Ein Hund läuft. A dog runs. " * 9], 300, framed=True)


def settings(file: str, **options: Any) -> ParallelSettings:
    columns = ParallelColumns(source="translation.en", target="translation.de")
    return ParallelSettings(train=file, validation=file, columns=columns, **options)


def test_both_sides(write: Write) -> None:
    chosen = settings(write("a.jsonl", ROWS))
    parts = load_parallel(chosen)
    assert list(texts(parts)) == [
        *("A dog runs.", "Hello."),
        *("Ein Hund läuft.", "Guten Tag, sagte der sehr freundliche Mann."),
    ]
    rows = encode(parts["train"], TOKENIZER, chosen)
    assert rows[0]["input_ids"] == TOKENIZER("A dog runs.").input_ids
    plain = TOKENIZER.encode("Ein Hund läuft.", add_special_tokens=False)
    assert rows[0]["labels"] == [*plain, TOKENIZER.eos_token_id]
    assert rows["length"][1] == len(rows["labels"][1]) > len(rows["input_ids"][1])


def test_long_sides_are_refused_or_cut(write: Write) -> None:
    file = write("a.jsonl", ROWS)
    chosen = settings(file, max_length=16)
    with pytest.raises(ValueError, match=r"row 2, field 'translation\.de': the row has \d+ tokens"):
        encode(load_parallel(chosen)["train"], TOKENIZER, chosen)
    cut = settings(file, max_length=16, truncate=True)
    rows = encode(load_parallel(cut)["train"], TOKENIZER, cut)
    assert max(rows["length"]) == 16
    assert rows["labels"][1][-1] == TOKENIZER.eos_token_id


def test_empty_side(write: Write) -> None:
    rows = [*ROWS, {"translation": {"de": "", "en": "Nothing."}}]
    with pytest.raises(ValueError, match=r"a\.jsonl, row 3, field 'translation\.de': is empty"):
        load_parallel(settings(write("a.jsonl", rows)))
