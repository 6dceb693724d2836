"""From the settings of a recipe to rows of tokens for training and for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import cast

from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from maha_attn.data.text import read_text, split_text
from maha_attn.data.tokenizer import load_tokenizer, train_tokenizer

_ROWS = Features({"input_ids": List(Value("int32"))})


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to learn from, and what to be judged by.

    Args:
        files: UTF-8 text files, one document each (.gz too); embedded:hard_times,
            embedded:lady_audleys_secret and embedded:alice_in_wonderland need no file.
        held_out: Part of each document, its end, that is never trained on.
        held_out_files: Documents to hold out instead; then held_out cuts nothing off.
        tokenizer: Folder of a byte-level tokenizer; left out, one of model.vocab_size tokens is
            trained on the training part.
        sequence_length: Tokens in a row, the model's context in training.
    """

    files: list[str]
    held_out: float = 0.1
    held_out_files: list[str] | None = None
    tokenizer: str | None = None
    sequence_length: int = 512

    def __post_init__(self) -> None:
        """Check what types do not say."""
        if not self.files:
            raise ValueError("data.files must name at least one text file, got none")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.held_out}")
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be at least 2, got {self.sequence_length}")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents to train on and documents held out; no character is in both."""

    train: list[str]
    held_out: list[str]


def read_texts(settings: DataSettings) -> Texts:
    """Read and split the documents.

    Raises:
        ValueError: A file is missing, empty or not UTF-8, or too short to hold a part of it out.
    """
    documents = [read_text(name) for name in settings.files]
    if settings.held_out_files:
        return Texts(train=documents, held_out=[read_text(f) for f in settings.held_out_files])
    parts = [split_text(document, settings.held_out) for document in documents]
    for name, (train, held_out) in zip(settings.files, parts, strict=True):
        if not train.strip() or not held_out.strip():
            raise ValueError(
                f"text file {name!r} is too short to hold out {settings.held_out:.0%} of it; give "
                "a longer text, or name other files in data.held_out_files"
            )
    return Texts(train=[train for train, _ in parts], held_out=[held for _, held in parts])


def make_tokenizer(
    settings: DataSettings, texts: Texts, vocab_size: int
) -> PreTrainedTokenizerFast:
    """Load the tokenizer that the settings name, or train one on the training part."""
    if settings.tokenizer is None:
        return train_tokenizer(texts.train, vocab_size)
    return load_tokenizer(settings.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The texts as rows of ``sequence_length`` tokens, and the tokenizer that made them."""

    train: Dataset
    held_out: Dataset
    tokenizer: PreTrainedTokenizerFast
    sequence_length: int


def make_rows(texts: Texts, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> Rows:
    """Pack both parts of the texts."""
    return Rows(
        train=pack(texts.train, tokenizer, sequence_length),
        held_out=pack(texts.held_out, tokenizer, sequence_length),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> Dataset:
    """Tokenise documents into rows without losing a token.

    Every document is followed by the end-of-text token; the rows are cut from the whole stream, so
    all have ``sequence_length`` tokens but the last. datasets keeps the rows in its cache: the
    same documents, tokenizer and length are tokenised once.

    Returns:
        A dataset with the column ``input_ids``.
    """
    rows = Dataset.from_generator(
        _rows,
        features=_ROWS,
        gen_kwargs={
            "documents": tuple(documents),
            "tokenizer_json": tokenizer.backend_tokenizer.to_str(),
            "end": tokenizer.eos_token_id,
            "sequence_length": sequence_length,
        },
    )
    return cast(Dataset, rows)


def _rows(
    documents: tuple[str, ...], tokenizer_json: str, end: int, sequence_length: int
) -> Iterator[dict[str, list[int]]]:
    """The rows of :func:`pack`; its arguments are all that the cache's key depends on."""
    encodings = Tokenizer.from_str(tokenizer_json).encode_batch_fast(
        documents, add_special_tokens=False
    )
    stream = list(chain.from_iterable((*encoding.ids, end) for encoding in encodings))
    for start in range(0, len(stream), sequence_length):
        yield {"input_ids": stream[start : start + sequence_length]}
