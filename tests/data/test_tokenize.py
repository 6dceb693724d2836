"""What all tasks' rows share: the cache, processes and progress bars."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tqdm import tqdm

from maha_attn.data import corpus, labelled, parallel, spans, tokenizer

Write = Callable[[str, list[dict[str, Any]]], str]
CONTEXT = "The café stood by the river. It closed in 1912."
ANSWERS = {"text": ["1912"], "answer_start": [42]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "labelled": [{"text": f"film {i}", "label": i % 2} for i in range(7)],
    "parallel": [{"source": f"dog {i}", "target": f"Hund {i}"} for i in range(7)],
    "spans": [{"context": CONTEXT, "question": f"When? {i}", "answers": ANSWERS} for i in range(7)],
    "corpus": [{"text": f"{CONTEXT} {i}"} for i in range(7)],
}
TOKENIZER = tokenizer.train_tokenizer([CONTEXT], 300, framed=True)


def encode(kind: str, file: str, **options: Any) -> Dataset:
    """Load and tokenise the training part."""
    options |= {"train": file, "validation": file}
    if kind == "labelled":
        settings = labelled.LabelledSettings(**options)
        part = labelled.load_labelled(settings).parts["train"]
        return labelled.encode(part, TOKENIZER, settings)
    if kind == "parallel":
        settings = parallel.ParallelSettings(**options)
        return parallel.encode(parallel.load_parallel(settings)["train"], TOKENIZER, settings)
    if kind == "spans":
        settings = spans.SpanSettings(**options)
        return spans.encode(spans.load_spans(settings)["train"], TOKENIZER, settings)
    settings = corpus.CorpusSettings(**options, sequence_length=16)
    return corpus.pack(corpus.load_documents(settings)["train"], TOKENIZER, settings)


def cached(rows: Dataset) -> dict[str, float]:
    """The files that hold the rows, and when they were written."""
    files = [file["filename"] for file in rows.cache_files]
    return {file: Path(file).stat().st_mtime for file in files}


def pieces() -> set[Path]:
    """What each of two processes has written into the cache."""
    return set(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*_of_00002.arrow"))


@pytest.mark.parametrize("kind", ROWS)
def test_the_same_data_are_tokenised_once(kind: str, write: Write) -> None:
    file = write("a.jsonl", ROWS[kind])
    first = cached(encode(kind, file))
    assert first
    assert cached(encode(kind, file)) == first
    other = cached(encode(kind, write("a.jsonl", ROWS[kind][1:])))
    assert not other.keys() & first.keys()


@pytest.mark.parametrize("kind", ROWS)
def test_processes_change_nothing(kind: str, write: Write) -> None:
    one = encode(kind, write("a.jsonl", ROWS[kind]))
    before = pieces()
    two = encode(kind, write("b.jsonl", ROWS[kind]), num_proc=2)
    assert two.to_list() == one.to_list()
    assert len(pieces() - before) == 2


@pytest.mark.parametrize("kind", ROWS)
def test_progress_is_shown(kind: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tqdm] = []
    make = tqdm.__init__

    def remember(bar: tqdm, *arguments: Any, **options: Any) -> None:
        make(bar, *arguments, **options)
        bars.append(bar)

    monkeypatch.setattr(tqdm, "__init__", remember)
    encode(kind, write("a.jsonl", [*ROWS[kind], ROWS[kind][0]]))
    done = {bar.desc.removesuffix(": "): bar.n for bar in bars if getattr(bar, "desc", "")}
    assert {"Checking a.jsonl", "Checking train", "Tokenising train"} <= done.keys()
    assert done["Checking train"] == done["Tokenising train"] == len(ROWS[kind]) + 1


@pytest.mark.parametrize(("characters", "shown"), [(100, False), (2000, True)])
def test_a_long_training_of_a_tokenizer_shows_its_progress(
    characters: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    make = tokenizer.trainers.BpeTrainer

    def remember(**options: Any) -> Any:
        found.append(options["show_progress"])
        return make(**options)

    monkeypatch.setattr(tokenizer.trainers, "BpeTrainer", remember)
    monkeypatch.setattr(tokenizer, "_LONG", 1000)
    texts = ["to be or not to be ", "xyxy "]
    made = tokenizer.train_tokenizer((text * (characters // 19) for text in texts), 262)
    assert found == [shown]
    assert {"xy", "be"} <= set(made.get_vocab())
