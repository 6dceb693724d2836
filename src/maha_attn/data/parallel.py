"""Pairs of a sentence and its translation to rows of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from maha_attn.data.source import Part, load_parts
from maha_attn.data.tokenize import ExampleSettings, refuse_long_rows, tokenise
from maha_attn.data.tokenizer import backend


@dataclass(frozen=True, kw_only=True)
class ParallelColumns:
    """Which columns of the data mean what.

    Args:
        source: The text to translate (en; translation.de where the column translation has both).
        target: Its translation.
    """

    source: str = "source"
    target: str = "target"


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(ExampleSettings):
    """Sentences with their translations, to learn from and to be judged by.

    Args:
        columns: Which columns mean what.
        max_length: Tokens that either side may have, special tokens included.
        truncate: Cut longer sides; else one is an error.
    """

    columns: ParallelColumns = field(default_factory=ParallelColumns)
    truncate: bool = False


def load_parallel(settings: ParallelSettings) -> dict[str, Part]:
    """Load the pairs by part.

    Raises:
        ValueError: Some data is missing, unreadable or empty.
    """
    names = settings.columns
    parts = load_parts(settings, {"source": names.source, "target": names.target})
    for part in parts.values():
        part.require_text("source", "target")
    return parts


def texts(parts: dict[str, Part]) -> Iterator[str]:
    """What a tokenizer for both languages learns from."""
    for side in ("source", "target"):
        yield from parts["train"].rows[side]


def encode(part: Part, tokenizer: PreTrainedTokenizerFast, settings: ParallelSettings) -> Dataset:
    """Tokenise both sides.

    Returns:
        A dataset with the columns ``input_ids``, the framed source; ``labels``, the target and the
        end-of-text token; and ``length``, the longer side's.

    Raises:
        ValueError: A side is too long.
    """
    rows = tokenise(
        part,
        _encode,
        tokenizer,
        settings,
        max_length=settings.max_length if settings.truncate else None,
        end=tokenizer.eos_token_id,
    )
    refuse_long_rows(
        part,
        rows,
        settings.max_length,
        lambda row: "source" if len(rows[row]["input_ids"]) > settings.max_length else "target",
    )
    return rows


def _encode(
    batch: dict[str, Any], tokenizer_json: str, max_length: int | None, end: int
) -> dict[str, list[Any]]:
    """Tokens of both sides."""
    tokenizer = backend(tokenizer_json, max_length)
    sources = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch_fast(batch["source"])]
    targets = [
        np.array([*e.ids[: max_length and max_length - 1], end], np.int32)
        for e in tokenizer.encode_batch_fast(batch["target"], add_special_tokens=False)
    ]
    lengths = [max(len(s), len(t)) for s, t in zip(sources, targets, strict=True)]
    return {"input_ids": sources, "labels": targets, "length": lengths}
