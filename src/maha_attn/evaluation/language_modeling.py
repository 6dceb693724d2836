"""Everything that is measured of a trained language model, as one result."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maha_attn.data.tokenizer import token_bytes
from maha_attn.evaluation.ngram import fit_ngrams
from maha_attn.evaluation.perplexity import (
    count_units,
    perplexities,
    score_tokens,
    scored_positions,
)


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """How held-out text is scored.

    Args:
        stride: Tokens by which the window moves on. Left out, windows do not overlap, and the
            first token of each is not scored; smaller strides give every token more context.
        batch_size: Windows at once.
        usage_rows: Windows over which the use of the scales is averaged.
        harness_tasks: Tasks of lm-evaluation-harness to run too: YAML files of local tasks, or
            names (extra lm_eval).
    """

    stride: int | None = None
    batch_size: int = 8
    usage_rows: int = 16
    harness_tasks: list[str] | None = None

    def check(self, sequence_length: int) -> None:
        """Refuse a stride that does not fit the windows."""
        if self.stride is not None and not 1 <= self.stride < sequence_length:
            raise ValueError(
                "evaluation.stride must be between 1 and data.sequence_length - 1 = "
                f"{sequence_length - 1}, got {self.stride}; leave it out for windows that do not "
                "overlap"
            )


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train: Dataset,
    held_out: Dataset,
    length: int,
    settings: PerplexitySettings,
) -> dict[str, Any]:
    """Score a causal language model beside unigram and bigram models of the training text.

    Returns:
        ``held_out``, what was scored; ``perplexities`` of ``maha``, ``bigram`` and ``unigram`` on
        the same tokens; ``smoothing`` of the last two.
    """
    tokens = stream(held_out)
    positions = scored_positions(len(tokens), length, settings.stride)
    units = count_units(tokens, positions, token_bytes(tokenizer))
    ngrams = fit_ngrams(stream(train), len(tokenizer))
    nll = {
        "maha": score_tokens(model, tokens, length, settings.stride, settings.batch_size).nll,
        "bigram": ngrams.bigram_nll(tokens, positions),
        "unigram": ngrams.unigram_nll(tokens, positions),
    }
    return {
        "held_out": asdict(units),
        "perplexities": {name: perplexities(values, units) for name, values in nll.items()},
        "smoothing": {"unigram_k": ngrams.k, "bigram_m": ngrams.m},
    }


def stream(rows: Dataset) -> NDArray[np.int64]:
    """Packed rows as the one stream of tokens that they were cut from."""
    return np.concatenate([np.asarray(row, np.int64) for row in rows["input_ids"]])
