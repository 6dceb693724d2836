"""Questions about contexts to windows of tokens, for extractive question answering.

A long context does not fit one row: it is cut into windows that overlap, each a row
``START question END context window END``. In a window that holds no whole answer, and for a
question that has none, the answer is the first token (START).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Encoding
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from maha_attn.data.source import Part, load_parts
from maha_attn.data.tokenize import ExampleSettings, tokenise
from maha_attn.data.tokenizer import backend

CONTEXT = 1
"""The number of the context among the two texts of a row."""


@dataclass(frozen=True, kw_only=True)
class SpanColumns:
    """Which columns of the data mean what.

    Args:
        context: A passage.
        question: A question about it.
        answers: text and answer_start, parallel lists; empty where the passage has no answer.
    """

    context: str = "context"
    question: str = "question"
    answers: str = "answers"


@dataclass(frozen=True, kw_only=True)
class SpanSettings(ExampleSettings):
    """Questions to learn from and to be judged by.

    Args:
        columns: Which columns mean what.
        max_length: Tokens of a row: the question, special tokens and a window of the context.
        stride: Tokens that successive windows of a context share.
    """

    columns: SpanColumns = field(default_factory=SpanColumns)
    max_length: int = 384
    stride: int = 128

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        if not 0 <= self.stride < self.max_length:
            raise ValueError(
                f"data.stride must be at least 0 and below data.max_length = {self.max_length}, "
                f"got {self.stride}"
            )


def load_spans(settings: SpanSettings) -> dict[str, Part]:
    """Load the questions by part.

    Raises:
        ValueError: Some data is missing, unreadable or empty, or an answer does not stand in its
            context where it should.
    """
    names = settings.columns
    parts = load_parts(
        settings,
        {
            "context": names.context,
            "question": names.question,
            "texts": f"{names.answers}.text",
            "starts": f"{names.answers}.answer_start",
        },
    )
    for part in parts.values():
        part.require_text("context", "question")
        _require_answers(part)
    return parts


def _require_answers(part: Part) -> None:
    """Refuse answers that are no such lists, or not in their contexts."""
    examples = zip(part.rows["context"], part.rows["texts"], part.rows["starts"], strict=True)
    checked = tqdm(examples, f"Checking {part.name}", len(part.rows), delay=2)
    for row, (context, texts, starts) in enumerate(checked):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            part.refuse(row, "texts", f"expected a list of texts, got {texts!r:.80}")
        if not isinstance(starts, list) or not all(type(i) is int and i >= 0 for i in starts):
            part.refuse(
                row,
                "starts",
                f"expected a list of whole numbers from 0, got {starts!r:.80} "
                "(a fraction, 1.0 too, makes fractions of all numbers of a file)",
            )
        if len(texts) != len(starts):
            part.refuse(row, "texts", f"has {len(texts)} text but {len(starts)} answer_start")
        for text, start in zip(texts, starts, strict=True):
            if not text or not context.startswith(text, start):
                found = context[start : start + max(len(text), 20)]
                part.refuse(
                    row, "texts", f"expected {text!r} in context at {start}; found {found!r}"
                )


def encode(part: Part, tokenizer: PreTrainedTokenizerFast, settings: SpanSettings) -> Dataset:
    """Tokenise questions and contexts into windows.

    Returns:
        A row a window: ``input_ids``; ``start_positions`` and ``end_positions``, the first answer's
        first and last token; ``question``, the row of ``part`` that it belongs to; ``offsets``,
        ``[start, end]`` of each token in the characters of the context, ``[-1, -1]`` outside it;
        and ``length``.

    Raises:
        ValueError: A question leaves no room for its context.
    """
    _require_room(part, tokenizer, settings.max_length, settings.stride)
    rows = part.rows.add_column("row", list(range(len(part.rows))))  # pyright: ignore[reportCallIssue]
    return tokenise(
        replace(part, rows=rows),
        _encode,
        tokenizer,
        settings,
        max_length=settings.max_length,
        stride=settings.stride,
    )


def encode_questions(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
) -> Dataset:
    """The windows of questions that wait for an answer; otherwise as :func:`encode`.

    Raises:
        ValueError: There are not as many contexts as questions, one is empty, or a question leaves
            no room for its context.
    """
    num = len(questions)
    if isinstance(questions, str) or isinstance(contexts, str) or num != len(contexts):
        raise ValueError(
            "questions and contexts must be two lists of the same length, got "
            f"{type(questions).__name__} and {type(contexts).__name__} of {num} and {len(contexts)}"
        )
    rows: dict[str, list[Any]] = {"question": list(questions), "context": list(contexts)}
    part = Part("questions", Dataset.from_dict(rows), [("questions", num)])
    part.require_text("question", "context")
    _require_room(part, tokenizer, max_length, stride)
    rows |= {"row": list(range(num)), "texts": [[]] * num, "starts": [[]] * num}
    json = tokenizer.backend_tokenizer.to_str()
    return Dataset.from_dict(_encode(rows, json, max_length, stride))


def _require_room(
    part: Part, tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
) -> None:
    """Refuse questions so long that windows of the context would not move on."""
    json = tokenizer.backend_tokenizer.to_str()
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - stride - special - 1
    for start in range(0, len(part.rows), 10_000):
        questions = part.rows[start : start + 10_000]["question"]
        encodings = backend(json).encode_batch_fast(questions, add_special_tokens=False)
        for row, encoding in enumerate(encodings, start):
            if len(encoding) > room:
                part.refuse(
                    row,
                    "question",
                    f"has {len(encoding)} tokens; max_length = {max_length} and stride = {stride} "
                    f"leave room for {room}; raise max_length",
                )


def _encode(
    batch: dict[str, Any], tokenizer_json: str, max_length: int, stride: int
) -> dict[str, list[Any]]:
    """The windows of a batch of questions."""
    names = ("input_ids", "start_positions", "end_positions", "question", "offsets", "length")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    pairs = list(zip(batch["question"], batch["context"], strict=True))
    encodings = backend(tokenizer_json, max_length, stride).encode_batch(pairs)
    answers = zip(batch["row"], batch["texts"], batch["starts"], strict=True)
    for encoding, (row, texts, starts) in zip(encodings, answers, strict=True):
        span = (starts[0], starts[0] + len(texts[0])) if texts else None
        for window in (encoding, *encoding.overflowing):
            offsets = context_offsets(window)
            start, end = token_span(offsets, span)
            values = (np.array(window.ids, np.int32), start, end, row, offsets, len(window.ids))
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    return columns


def context_offsets(window: Encoding) -> np.ndarray:
    """``[N, 2]``: the characters of the context that each token covers, ``[-1, -1]`` outside."""
    offsets = np.array(window.offsets, np.int32)
    offsets[np.array([i != CONTEXT for i in window.sequence_ids])] = -1
    return offsets


def token_span(offsets: np.ndarray, span: tuple[int, int] | None) -> tuple[int, int]:
    """The first and last token of characters ``span``; ``(0, 0)`` where they are not all here."""
    if span is None:
        return 0, 0
    inside = offsets[:, 0] >= 0
    starts = np.flatnonzero(inside & (offsets[:, 0] <= span[0]) & (span[0] < offsets[:, 1]))
    ends = np.flatnonzero(inside & (offsets[:, 0] < span[1]) & (span[1] <= offsets[:, 1]))
    return (int(starts[0]), int(ends[-1])) if len(starts) and len(ends) else (0, 0)
