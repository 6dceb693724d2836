"""Labelled texts and pairs of texts to rows of tokens, for sequence classification."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerFast

from maha_attn.data.source import Part, load_parts
from maha_attn.data.tokenize import ExampleSettings, refuse_long_rows, tokenise
from maha_attn.data.tokenizer import backend


@dataclass(frozen=True, kw_only=True)
class LabelledColumns:
    """Which columns of the data mean what.

    Args:
        text: The text, or the first of a pair (sentence; premise).
        pair: The second text of a pair (hypothesis); left out, there are no pairs.
        label: The class: a whole number from 0, or its name.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(ExampleSettings):
    """Labelled texts to learn from and to be judged by.

    Args:
        columns: Which columns mean what.
        labels: Names of the classes, in the order of their numbers. Left out, they are those of
            the dataset, or the values that the training part has: names, or all numbers from 0.
        truncate: Cut rows of more than max_length tokens; else one is an error.
    """

    columns: LabelledColumns = field(default_factory=LabelledColumns)
    labels: list[str] | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"data.labels must name two or more classes once, got {self.labels}")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled texts by part, and the names of the classes."""

    parts: dict[str, Part]
    labels: list[str]

    def texts(self) -> Iterator[str]:
        """What a tokenizer learns from."""
        rows = self.parts["train"].rows
        for name in ("text", "pair"):
            if name in rows.column_names:
                yield from rows[name]


def load_labelled(settings: LabelledSettings) -> Labelled:
    """Load the texts and turn their labels into numbers.

    Raises:
        ValueError: Some data is missing, unreadable or empty, or a label is none of the classes.
    """
    names = settings.columns
    columns = {"text": names.text, "label": names.label}
    if names.pair is not None:
        columns["pair"] = names.pair
    parts = load_parts(settings, columns)
    for part in parts.values():
        part.require_text(*(name for name in ("text", "pair") if name in columns))
        _require_labels(part)
    labels = settings.labels or _labels(parts["train"])
    return Labelled(
        parts={name: _number(part, labels) for name, part in parts.items()}, labels=labels
    )


def _require_labels(part: Part) -> None:
    """Refuse what is no label; 1.0 and True are not taken for 1.

    A row without a label is looked for first: in a CSV file, it makes fractions of all numbers.
    """
    found = part.first("label", lambda label: label is None)
    found = found or part.first("label", lambda label: type(label) not in (int, str))
    if found:
        row, label = found
        part.refuse(row, "label", f"expected a number from 0 or a name of a class, got {label!r}")


def _labels(train: Part) -> list[str]:
    """The classes of the training part."""
    kind = train.rows.features["label"]
    if isinstance(kind, ClassLabel):
        return list(kind.names)
    first = train.rows[0]["label"]
    if mixed := train.first("label", lambda label: type(label) is not type(first)):
        row, label = mixed
        train.refuse(row, "label", f"expected numbers or names alone, got {first!r} and {label!r}")
    found = set(train.rows["label"])
    if len(found) < 2:
        train.refuse(0, "label", f"expected two or more classes, got {first!r} in every row")
    return [str(i) for i in range(len(found))] if isinstance(first, int) else sorted(found)


def _number(part: Part, labels: list[str]) -> Part:
    """Labels as numbers, each of them one of the classes."""
    number = {name: i for i, name in enumerate(labels)} | {i: i for i in range(len(labels))}
    if wrong := part.first("label", lambda label: label not in number):
        row, label = wrong
        hint = "data.labels names the classes"
        if label == -1:
            hint = "a part whose labels are hidden cannot be scored"
        part.refuse(
            row,
            "label",
            f"expected one of {', '.join(labels)}, or a number from 0 to {len(labels) - 1}; got "
            f"{label!r}; {hint}",
        )
    numbers = [number[label] for label in part.rows["label"]]
    rows = part.rows.remove_columns("label").add_column("label", numbers)  # pyright: ignore[reportCallIssue]
    return replace(part, rows=rows)


def encode(part: Part, tokenizer: PreTrainedTokenizerFast, settings: LabelledSettings) -> Dataset:
    """Tokenise texts, or pairs of texts, each in one row.

    Returns:
        A dataset with the columns ``input_ids``, ``label`` and ``length``.

    Raises:
        ValueError: A row is too long.
    """
    max_length = settings.max_length if settings.truncate else None
    rows = tokenise(part, _encode, tokenizer, settings, max_length=max_length)
    fields = [name for name in ("text", "pair") if name in part.rows.column_names]
    refuse_long_rows(
        part,
        rows,
        settings.max_length,
        lambda row: max(fields, key=lambda field: len(part.rows[row][field])),
    )
    return rows


def _encode(
    batch: dict[str, Any], tokenizer_json: str, max_length: int | None
) -> dict[str, list[Any]]:
    """Tokens of texts or pairs, and how many."""
    texts = (
        list(zip(batch["text"], batch["pair"], strict=True)) if "pair" in batch else batch["text"]
    )
    encodings = backend(tokenizer_json, max_length).encode_batch_fast(texts)
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return {"input_ids": ids, "label": batch["label"], "length": [len(row) for row in ids]}
