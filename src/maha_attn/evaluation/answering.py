"""Answering questions about passages with a trained model.

transformers had a pipeline for this and removed it; it refuses the pipeline's name even where one
is registered under it. So this is a function, on what training and evaluation use themselves.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerFast

from maha_attn.data.spans import SpanSettings, encode_questions
from maha_attn.data.tokenizer import frame
from maha_attn.evaluation.predict import predict
from maha_attn.evaluation.spans import Answer, SpanEvaluationSettings, find_answers

FOR_MODEL = ["input_ids", "length"]
"""The columns of windows that a model sees, and what batches are made by."""


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_length: int = SpanSettings.max_length,
    stride: int = SpanSettings.stride,
    longest: int = SpanEvaluationSettings.max_answer_tokens,
    batch_size: int = SpanEvaluationSettings.batch_size,
) -> list[Answer]:
    """Find the part of each passage that answers its question.

    A passage of any length is read in windows that overlap, as in training::

        folder = "runs/squad/model"
        model = MahaForQuestionAnswering.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (answer,) = answer_questions(model, tokenizer, ["When did it close?"], [passage])

    Args:
        model: A :class:`~maha_attn.models.MahaForQuestionAnswering`, on any device.
        tokenizer: Its own; framed as :func:`~maha_attn.data.tokenizer.frame` does.
        questions: Some text each.
        contexts: The passages, one a question.
        max_length: Tokens of a window, the question included.
        stride: Tokens that successive windows share.
        longest: Longest answer in tokens.
        batch_size: Windows at once.

    Returns:
        An answer a question: the text, where it begins, and by how much the score of no answer
        exceeds its score. Beyond a threshold (evaluation.json of a run has the best one of its
        validation part) take the passage to hold none.

    Raises:
        ValueError: There are not as many passages as questions, one is empty, or a question leaves
            no room for its passage.
    """
    tokenizer = frame(tokenizer)
    windows = encode_questions(questions, contexts, tokenizer, max_length, stride)
    starts, ends = window_logits(model, tokenizer, windows, batch_size, "Answering")
    return window_answers(windows, contexts, starts, ends, longest)


def window_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    windows: Dataset,
    batch_size: int,
    description: str,
) -> tuple[list[Any], list[Any]]:
    """The scores of each window's tokens, as starts and as ends of an answer.

    Args:
        model: Scores them.
        tokenizer: Pads, on the right.
        windows: Of :func:`~maha_attn.data.spans.encode`.
        batch_size: Windows at once.
        description: Of the progress bar.
    """
    starts: list[Any] = [None] * len(windows)
    ends: list[Any] = [None] * len(windows)
    rows, collator = windows.select_columns(FOR_MODEL), DataCollatorWithPadding(tokenizer)
    for chosen, output in predict(model, rows, collator, batch_size, description):
        for scores, logits in ((starts, output.start_logits), (ends, output.end_logits)):
            for row, values in zip(chosen, logits.float().cpu().numpy(), strict=True):
                scores[row] = values
    return starts, ends


def window_answers(
    windows: Dataset, contexts: Sequence[str], starts: Any, ends: Any, longest: int
) -> list[Answer]:
    """The best answer to each question, as :func:`find_answers` finds it in scored windows."""
    offsets = windows.with_format("numpy")["offsets"]
    return find_answers(
        contexts,
        list(windows["question"]),
        [np.asarray(window) for window in offsets],
        starts,
        ends,
        longest,
    )
