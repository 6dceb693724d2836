"""How a language model is judged: whole held-out books, causality, the fusion's weights."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from maha_attn.data.tokenizer import token_bytes
from maha_attn.evaluation.adaptivity import weight_variation
from maha_attn.evaluation.causality import check_causal
from maha_attn.evaluation.documents import (
    document_units,
    score_documents,
    split_documents,
    spread_windows,
)
from maha_attn.evaluation.frozen import frozen_weights
from maha_attn.evaluation.language_modeling import stream
from maha_attn.evaluation.perplexity import TextUnits, perplexities
from maha_attn.experiments.statistics import Document, bits_per_byte, bootstrap_error
from maha_attn.explain.attention import explain_text
from maha_attn.models import MahaConfig
from maha_attn.tasks import Task
from maha_attn.training.model import build_model
from maha_attn.training.recipe import Recipe

_MOVED = ("moved", "moved_by_window")
PASSAGE_TOKENS = 256
"""Length of the held-out passage whose attention is kept: twice the tables' windows."""


def judge_on_books(task: Task, model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Score the test part, or else the validation part, book by book.

    Returns:
        ``metrics``; ``documents`` and ``positions`` of :func:`score_documents`, each document also
        with ``static_nll``, where weights were frozen; ``fusion`` of :func:`weight_variation` on
        ``evaluation.usage_rows`` windows, with ``moved_untrained`` of the model as it was before
        training.

    Raises:
        LeakError: The model looks ahead; nothing is scored then.
    """
    length, settings, bf16 = task.data.sequence_length, recipe.evaluation, recipe.train.bf16
    part, books, units = _held_out(task)
    windows = spread_windows(books, length, settings.usage_rows)
    some = windows[: settings.batch_size] if len(windows) else books[0][None, :length]
    check_causal(model, some, bf16)

    def score() -> dict[str, Any]:
        return score_documents(model, books, units, length, settings.batch_size, bf16)

    scores = score()
    documents = scores["documents"]
    fusion = weight_variation(model, windows, bf16)
    metrics = {**_metrics(documents), "causal": True}
    if fusion is not None:
        fusion |= _untrained(task, model, recipe, windows)
        if _looks(model):
            with frozen_weights(model, fusion["layers"]):
                static = score()["documents"]
            metrics["static_bits_per_byte"] = bits_per_byte(static)
            for document, frozen in zip(documents, static, strict=True):
                document["static_nll"] = frozen["nll"]
    return {"metrics": metrics, **scores, "part": part, "fusion": fusion}


def explain_passage(task: Task, model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Attention on a passage of the first book, by :func:`explain_text`.

    Returns:
        What that returns, and ``start``, the passage's first token in the book: where a paragraph
        begins, in the middle of the book, past headings and lists.
    """
    _, books, _ = _held_out(task)
    start = _paragraph(books[0], task.tokenizer)
    passage = books[0][start : start + PASSAGE_TOKENS].tolist()
    return {"start": start, **explain_text(model, task.tokenizer, passage, recipe.train.bf16)}


def _paragraph(book: NDArray[np.int64], tokenizer: PreTrainedTokenizerFast) -> int:
    """Where the first paragraph after the book's middle begins that leaves room for the passage."""
    middle = max(0, min(len(book) // 2, len(book) - 2 * PASSAGE_TOKENS))
    bytes_of, before = token_bytes(tokenizer), b""
    for start, token in enumerate(book[middle : middle + PASSAGE_TOKENS].tolist(), middle):
        if before.endswith(b"\n\n") and not bytes_of[token].startswith(b"\n"):
            return start
        before += bytes_of[token]
    return middle


def _metrics(documents: Sequence[Document]) -> dict[str, float | None]:
    """Of all documents together, with errors by bootstrap over documents."""

    def total(name: str, indices: Sequence[int]) -> float:
        return math.fsum(documents[i][name] for i in indices)

    def perplexity(indices: Sequence[int]) -> float:
        return math.exp(total("nll", indices) / total("tokens", indices))

    every = range(len(documents))
    units = TextUnits(**{n: int(total(n, every)) for n in ("tokens", "words", "bytes")})
    errors = {
        "bits_per_byte_error": lambda i: bits_per_byte([documents[k] for k in i]),
        "perplexity_error": perplexity,
    }
    found = {name: bootstrap_error(value, len(documents)) for name, value in errors.items()}
    return {
        **perplexities(np.array([total("nll", every)]), units),
        **{name: None if math.isnan(error) else error for name, error in found.items()},
        "token_accuracy": 100 * total("correct", every) / units.tokens,
    }


def _looks(model: PreTrainedModel) -> bool:
    """Its fusion depends on the input."""
    config = model.config
    assert isinstance(config, MahaConfig)
    return config.fusion not in ("mean", "static")


def _untrained(
    task: Task, model: PreTrainedModel, recipe: Recipe, windows: NDArray[np.int64]
) -> dict[str, Any]:
    """By how much the weights of the new model of this seed moved."""
    set_seed(recipe.train.seed)
    new: Any = build_model(task.model_class, recipe.model, None)
    new.to(model.device)
    found = weight_variation(new, windows, recipe.train.bf16)
    assert found is not None, "it has the scales of the trained model"
    return {name.replace("moved", "moved_untrained"): found[name] for name in _MOVED}


def _held_out(task: Task) -> tuple[str, list[NDArray[np.int64]], list[dict[str, int]]]:
    """The part that is scored, its books, and what their scored tokens stand for."""
    part = "test" if "test" in task.rows else "validation"
    return part, *_books(task.rows[part], task.tokenizer, task.data.sequence_length)


@lru_cache(maxsize=1)
def _books(
    rows: Dataset, tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[list[NDArray[np.int64]], list[dict[str, int]]]:
    """The books and what their scored tokens stand for, counted once for all rows of a table."""
    books = split_documents(stream(rows), cast(int, tokenizer.eos_token_id))
    return books, document_units(books, token_bytes(tokenizer), length)
