"""How a language model is judged: whole held-out books, the fusion's weights, one passage."""

import math
from functools import lru_cache
from typing import Any, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maha_attn.data.tokenizer import token_bytes
from maha_attn.evaluation.adaptivity import weight_variation
from maha_attn.evaluation.documents import document_units, score_documents, split_documents
from maha_attn.evaluation.language_modeling import stream
from maha_attn.evaluation.perplexity import TextUnits, perplexities
from maha_attn.experiments.statistics import bits_per_byte, bootstrap_error
from maha_attn.explain.attention import explain_text
from maha_attn.tasks import Task
from maha_attn.training.recipe import Recipe

PASSAGE_TOKENS = 32
"""Length of the held-out passage whose attention is kept."""


def judge_on_books(task: Task, model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Score the test part, or else the validation part, book by book.

    Returns:
        ``metrics``; ``documents`` and ``positions`` of :func:`score_documents`; ``fusion`` of
        :func:`weight_variation` and ``attention`` of :func:`explain_text`, on the first book.
    """
    length, settings, bf16 = task.data.sequence_length, recipe.evaluation, recipe.train.bf16
    part = "test" if "test" in task.rows else "validation"
    books, units = _books(task.rows[part], task.tokenizer, length)
    scores = score_documents(model, books, units, length, settings.batch_size, bf16)
    documents, first = scores["documents"], books[0]
    nll = math.fsum(d["nll"] for d in documents)
    whole = TextUnits(**{n: sum(d[n] for d in documents) for n in ("tokens", "words", "bytes")})
    error = bootstrap_error(lambda i: bits_per_byte([documents[k] for k in i]), len(documents))
    passage = first[:PASSAGE_TOKENS].tolist()
    return {
        "metrics": {
            **perplexities(np.array([nll]), whole),
            "bits_per_byte_error": None if math.isnan(error) else error,
        },
        **scores,
        "part": part,
        "fusion": weight_variation(model, first, length, settings.usage_rows, bf16),
        "attention": explain_text(model, task.tokenizer, passage, bf16),
    }


@lru_cache(maxsize=1)
def _books(
    rows: Dataset, tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[list[NDArray[np.int64]], list[dict[str, int]]]:
    """The books and what their scored tokens stand for, counted once for all rows of a table."""
    books = split_documents(stream(rows), cast(int, tokenizer.eos_token_id))
    return books, document_units(books, token_bytes(tokenizer), length)
