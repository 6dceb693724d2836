"""Documents to rows of tokens, for language models and masked language models."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from maha_attn.data.files import split_text
from maha_attn.data.source import Part, SourceSettings, load_parts
from maha_attn.data.tokenize import tokenise
from maha_attn.data.tokenizer import backend

_ROWS = Features({"input_ids": List(Value("int32"))})


@dataclass(frozen=True, kw_only=True)
class CorpusColumns:
    """Which columns of the data mean what.

    Args:
        text: A document.
    """

    text: str = "text"


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(SourceSettings):
    """Documents to learn from and to be judged by; embedded:NAME is a novel of the package.

    Args:
        columns: Which columns mean what.
        held_out: Part of each training document, its end, that is held out instead where there
            is no validation.
        tokenizer: Folder of a byte-level tokenizer; left out, one of model.vocab_size tokens is
            trained on the training part.
        sequence_length: Tokens in a row, the model's context in training. Rows are cut from the
            stream of all documents; one may hold the end of a document and the beginning of the
            next, and attention crosses the end-of-text token between them.
    """

    columns: CorpusColumns = field(default_factory=CorpusColumns)
    held_out: float = 0.1
    tokenizer: str | None = None
    sequence_length: int = 512

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.held_out}")
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be at least 2, got {self.sequence_length}")


def load_documents(settings: CorpusSettings) -> dict[str, Part]:
    """Load the documents by part, and split them where nothing else is held out.

    Raises:
        ValueError: Some data is missing, unreadable or empty, or too short to hold a part out.
    """
    parts = load_parts(settings, {"text": settings.columns.text})
    for part in parts.values():
        part.require_text("text")
    if "validation" not in parts:
        parts["train"], parts["validation"] = _hold_out(parts["train"], settings.held_out)
    return parts


def _hold_out(part: Part, held_out: float) -> tuple[Part, Part]:
    """The beginnings and the ends of all documents."""

    def cut(piece: int) -> Dataset:
        options = {"held_out": held_out, "piece": piece}
        return part.rows.map(_cut, fn_kwargs=options, desc="Holding text out")

    train, validation = (
        replace(part, name=name, rows=cut(piece))
        for piece, name in enumerate(("train", "validation"))
    )
    for piece in (train, validation):
        if found := piece.first("text", lambda text: not text.strip()):
            raise ValueError(
                f"{part.where(found[0])}: is too short to hold out {held_out:.0%} of it; give a "
                "longer text, or name other data in data.validation"
            )
    return train, validation


def _cut(row: dict[str, str], held_out: float, piece: int) -> dict[str, str]:
    """A document's beginning (piece 0) or end (piece 1)."""
    return {"text": split_text(row["text"], held_out)[piece]}


def pack(part: Part, tokenizer: PreTrainedTokenizerFast, settings: CorpusSettings) -> Dataset:
    """Tokenise documents into rows without losing a token.

    Every document is followed by the end-of-text token; the rows are cut from the whole stream, so
    all have ``sequence_length`` tokens but the last. That token is all that marks the boundary of
    two documents in a row: attention crosses it, and so do the blocks of the coarse scales.
    datasets keeps the tokens and the rows in its cache: the same documents, tokenizer and length
    are worked on once.

    Returns:
        A dataset with the column ``input_ids``.
    """
    ids = tokenise(part, _encode, tokenizer, settings, batch_size=8, end=tokenizer.eos_token_id)
    rows = Dataset.from_generator(
        _rows,
        features=_ROWS,
        gen_kwargs={"documents": ids, "sequence_length": settings.sequence_length},
    )
    return cast(Dataset, rows)


def _encode(batch: dict[str, Any], tokenizer_json: str, end: int) -> dict[str, list[Any]]:
    """Tokens of documents, each with the end-of-text token."""
    encodings = backend(tokenizer_json).encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"input_ids": [np.array([*encoding.ids, end], np.int32) for encoding in encodings]}


def _rows(documents: Dataset, sequence_length: int) -> Iterator[dict[str, NDArray[np.int32]]]:
    """Cut the stream of all documents, holding one document at a time."""
    rest = np.empty(0, np.int32)
    for document in documents.with_format("numpy").iter(batch_size=1):
        (ids,) = cast(dict[str, Any], document)["input_ids"]
        stream = np.concatenate([rest, ids])
        whole = len(stream) - len(stream) % sequence_length
        for start in range(0, whole, sequence_length):
            yield {"input_ids": stream[start : start + sequence_length]}
        rest = stream[whole:]
    if len(rest):
        yield {"input_ids": rest}
