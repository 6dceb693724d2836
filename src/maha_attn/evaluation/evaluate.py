"""Everything that is measured of a trained language model, as one result."""

from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel

from maha_attn.data.corpus import Rows
from maha_attn.data.tokenizer import token_bytes
from maha_attn.evaluation.generation import continue_text
from maha_attn.evaluation.ngram import fit_ngrams
from maha_attn.evaluation.perplexity import count_units, perplexities, scored_positions, token_nll
from maha_attn.evaluation.scale_usage import scale_usage
from maha_attn.training.recipe import EvaluationSettings, GenerationSettings


def evaluate(
    model: PreTrainedModel,
    rows: Rows,
    settings: EvaluationSettings,
    generation: GenerationSettings,
) -> dict[str, Any]:
    """Score a causal language model beside unigram and bigram models of the training text.

    Returns:
        What evaluation.json holds: ``settings``; ``held_out``, what was scored; ``perplexities``
        of ``maha``, ``bigram`` and ``unigram`` on the same tokens; ``smoothing`` of the last two;
        ``scale_usage``; and ``sample``, a generated passage.
    """
    held_out = stream(rows.held_out)
    length = rows.sequence_length
    positions = scored_positions(len(held_out), length, settings.stride)
    units = count_units(held_out, positions, token_bytes(rows.tokenizer))
    ngrams = fit_ngrams(stream(rows.train), len(rows.tokenizer))
    nll = {
        "maha": token_nll(model, held_out, length, settings.stride, settings.batch_size),
        "bigram": ngrams.bigram_nll(held_out, positions),
        "unigram": ngrams.unigram_nll(held_out, positions),
    }
    return {
        "settings": {**asdict(settings), "sequence_length": length},
        "held_out": asdict(units),
        "perplexities": {name: perplexities(values, units) for name, values in nll.items()},
        "smoothing": {"unigram_k": ngrams.k, "bigram_m": ngrams.m},
        "scale_usage": scale_usage(model, held_out, length, settings.usage_rows),
        "sample": {**asdict(generation), "text": continue_text(model, rows.tokenizer, generation)},
    }


def stream(rows: Dataset) -> NDArray[np.int64]:
    """Packed rows as the one stream of tokens that they were cut from."""
    return np.concatenate([np.asarray(row, np.int64) for row in rows["input_ids"]])
