"""Windows of long contexts: every character of an answer is where the tokens say."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maha_attn.data.spans import SpanSettings, encode, load_spans
from maha_attn.data.tokenizer import train_tokenizer

Write = Callable[[str, list[dict[str, Any]]], str]
CONTEXT = "The café stood by the river — naïve painters met there. " * 6 + "It closed in 1912."
TOKENIZER = train_tokenizer([CONTEXT], 320, framed=True)


def question(text: str, *answers: str, context: str = CONTEXT) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {
        "question": text,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
    }


ROWS = [
    question("When did it close?", "1912", "in 1912"),
    question("Who met?", "naïve painters"),
    question("Who owned it?"),
]


def settings(file: str, **options: Any) -> SpanSettings:
    return SpanSettings(
        **({"train": file, "validation": file, "max_length": 48, "stride": 16} | options)
    )


def test_windows(write: Write) -> None:
    chosen = settings(write("a.jsonl", ROWS))
    windows = encode(load_spans(chosen)["train"], TOKENIZER, chosen)
    covered = [set() for _ in ROWS]
    found = [set() for _ in ROWS]
    for window in windows:
        ids, offsets = window["input_ids"], np.array(window["offsets"])
        row = ROWS[window["question"]]
        assert len(ids) == len(offsets) == window["length"] <= 48
        inside = np.flatnonzero(offsets[:, 0] >= 0)
        start, end = offsets[inside[0], 0], offsets[inside[-1], 1]
        head = TOKENIZER(row["question"], row["context"][start:end]).input_ids
        assert ids == head  # START question END window END
        covered[window["question"]] |= set(range(start, end))
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) != (0, 0):
            text = row["context"][offsets[first, 0] : offsets[last, 1]].strip()
            found[window["question"]].add(text)
    assert all(characters == set(range(len(CONTEXT))) for characters in covered)
    assert found == [{"1912"}, {"naïve painters"}, set()]


def test_successive_windows_share_the_stride(write: Write) -> None:
    chosen = settings(write("a.jsonl", ROWS[:1]))
    windows = encode(load_spans(chosen)["train"], TOKENIZER, chosen)
    contexts = [
        [i for i, o in zip(w["input_ids"], w["offsets"], strict=True) if o[0] >= 0] for w in windows
    ]
    assert len(contexts) > 2
    for before, after in pairwise(contexts):
        assert before[-16:] == after[:16]


def test_genuine_answers_survive_tokenising(shared_data: Path) -> None:
    file = str(shared_data / "squad" / "validation.jsonl.gz")
    chosen = SpanSettings(train=file, validation=file, limit=60)
    part = load_spans(chosen)["train"]
    for window in encode(part, TOKENIZER, chosen):
        row, first, last = (
            part.rows[window["question"]],
            window["start_positions"],
            window["end_positions"],
        )
        if first:
            offsets = window["offsets"]
            text = row["context"][offsets[first][0] : offsets[last][1]]
            assert row["texts"][0] in text
            assert len(text) <= len(row["texts"][0]) + 40  # whole tokens: " in" or a longer merge


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answers": {"text": ["1913"], "answer_start": [3]}},
            r"a\.jsonl, row 2, field 'answers.text': expected '1913' in context at 3; found ' café",
        ),
        (
            {"answers": {"text": ["The"], "answer_start": [0, 5]}},
            "row 2, field 'answers.text': has 1 text but 2 answer_start",
        ),
        ({"context": ""}, "row 2, field 'context': is empty"),
        ({"answers": None}, r"row 2, field 'answers\.text': expected a list of texts, got None"),
        (
            {"answers": {"text": [None], "answer_start": [0]}},
            r"row 2, field 'answers\.text': expected a list of texts, got \[None\]",
        ),
        (
            {"answers": {"text": "The", "answer_start": 0}},
            r"row 2, field 'answers\.text': expected a list of texts, got 'The'",
        ),
        *(
            (
                {"answers": {"text": ["1912."], "answer_start": starts}},
                r"row 2, field 'answers\.answer_start': expected a list of whole numbers from 0, "
                rf"got {re.escape(repr(starts))}",
            )
            for starts in (None, [None], 4, ["four"], [-5])
        ),
        (
            {"answers": {"text": ["The"], "answer_start": [0.0]}},
            r"'answers\.answer_start': expected a list of whole numbers .* \(a fraction, 1\.0 too",
        ),
    ],
)
def test_bad_rows(write: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_spans(settings(write("a.jsonl", [ROWS[0], ROWS[0] | row])))


def test_missing_answers(write: Write) -> None:
    rows = [{"question": "a?", "context": "b"}]
    with pytest.raises(ValueError, match=r"no column 'answers\.text' \(data\.columns names them\)"):
        load_spans(settings(write("a.jsonl", rows)))


def test_long_question(write: Write) -> None:
    chosen = settings(write("a.jsonl", [ROWS[0], question("why " * 40 + "?")]))
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2, field 'question': has \d+ tokens"):
        encode(load_spans(chosen)["train"], TOKENIZER, chosen)


def test_bad_stride() -> None:
    with pytest.raises(
        ValueError, match=r"data\.stride must be at least 0 and below .* = 48, got 48"
    ):
        settings("a", stride=48)
