"""How well answers are found: exact match and F1 of SQuAD 2.0, with its no-answer threshold.

The definitions are those of the data set's official script, version 2.0 (Rajpurkar, Jia and Liang,
"Know What You Don't Know", arXiv 1806.03822): an answer is compared after lower-casing and without
punctuation, articles and superfluous white space; the best over the reference answers counts; a
question without an answer is answered rightly by the empty string alone.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class SpanEvaluationSettings:
    """How answers are found and scored.

    Args:
        batch_size: Windows at once.
        max_answer_tokens: Longest answer.
        no_answer_threshold: A question counts as unanswerable where the score of no answer exceeds
            that of the best answer by more. The test part takes the threshold that is best on
            the validation part where this is left out, and the validation part takes 0.
    """

    batch_size: int = 32
    max_answer_tokens: int = 30
    no_answer_threshold: float | None = None


@dataclass(frozen=True)
class Answer:
    """The best answer to a question.

    Args:
        text: As it stands in the context.
        no_answer_margin: By how much the score of no answer exceeds that of this one.
        start: The character of the context where it begins, if known.
    """

    text: str
    no_answer_margin: float
    start: int | None = None


def best_span(
    start: NDArray[np.floating], end: NDArray[np.floating], inside: NDArray[np.bool_], longest: int
) -> tuple[int, int, float]:
    """The span ``i ≤ j < i + longest`` of tokens ``inside`` that maximises ``start[i] + end[j]``.

    Returns:
        ``i``, ``j`` and the maximum.
    """
    span = np.triu(np.tri(len(start), k=longest - 1, dtype=bool))
    scores = np.where(inside, start, -np.inf)[:, None] + np.where(inside, end, -np.inf)[None]
    scores[~span] = -np.inf
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return int(i), int(j), float(scores[i, j])


def find_answers(
    contexts: Sequence[str],
    questions: Sequence[int],
    offsets: Sequence[NDArray[np.integer]],
    start_logits: Sequence[NDArray[np.floating]],
    end_logits: Sequence[NDArray[np.floating]],
    longest: int,
) -> list[Answer]:
    """The best answer to every question, over all windows of its context.

    The score of no answer is that of the first token, the lowest over the windows: one window that
    is sure of its answer is enough.

    Args:
        contexts: One a question.
        questions: The question's number, one a window.
        offsets: ``[N, 2]``, the characters of the context that each token covers; -1 outside.
        start_logits: ``[≥ N]``, one a window.
        end_logits: ``[≥ N]``, one a window.
        longest: Longest answer in tokens.
    """
    best = [("", -np.inf, 0)] * len(contexts)
    none = np.full(len(contexts), np.inf)
    for question, where, starts, ends in zip(
        questions, offsets, start_logits, end_logits, strict=True
    ):
        start, end = starts[: len(where)], ends[: len(where)]
        none[question] = min(none[question], float(start[0] + end[0]))
        i, j, score = best_span(start, end, where[:, 0] >= 0, longest)
        if score > best[question][1]:
            text = contexts[question][where[i, 0] : where[j, 1]]
            first = int(where[i, 0]) + len(text) - len(text.lstrip())
            best[question] = (text.strip(), score, first)
    return [
        Answer(text, float(n - score), start)
        for (text, score, start), n in zip(best, none, strict=True)
    ]


def span_scores(
    answers: Sequence[Answer], references: Sequence[Sequence[str]], threshold: float = 0.0
) -> dict[str, float]:
    """Exact match and F1, in percent.

    Args:
        answers: The best answer to each question.
        references: The texts of its true answers; none where it has no answer.
        threshold: Where ``no_answer_margin`` exceeds it the answer is taken to be the empty string.

    Returns:
        ``exact`` and ``f1`` over all questions; ``has_answer_exact``, ``has_answer_f1`` and
        ``no_answer_exact`` over those with and without an answer, where there are any;
        ``forced_exact`` and ``forced_f1`` over those with an answer, whatever the margin: does the
        model find it, once it is told that there is one? ``best_exact`` and ``best_f1``, with the
        thresholds that maximise them on these very questions, and those thresholds; ``threshold``.
    """
    answerable = np.array([bool(texts) for texts in references])
    margins = np.array([answer.no_answer_margin for answer in answers])
    scores = {
        "exact": np.array(
            [_best(exact, a.text, r) for a, r in zip(answers, references, strict=True)]
        ),
        "f1": np.array([_best(f1, a.text, r) for a, r in zip(answers, references, strict=True)]),
    }
    empty = ~answerable  # what the empty string scores
    result: dict[str, float] = {"threshold": threshold}
    for name, raw in scores.items():
        chosen = np.where(margins > threshold, empty, raw)
        result[name] = 100 * float(chosen.mean())
        if answerable.any():
            result[f"has_answer_{name}"] = 100 * float(chosen[answerable].mean())
            result[f"forced_{name}"] = 100 * float(raw[answerable].mean())
        best, at = _best_threshold(margins, raw, empty)
        result |= {f"best_{name}": 100 * best, f"best_{name}_threshold": at}
    if empty.any():
        chosen = np.where(margins > threshold, empty, scores["exact"])
        result["no_answer_exact"] = 100 * float(chosen[empty].mean())
    return result


def forced_f1(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[float]:
    """F1 of each question that has an answer, whatever the margin, from 0 to 1."""
    pairs = zip(answers, references, strict=True)
    return [_best(f1, answer.text, texts) for answer, texts in pairs if texts]


def _best_threshold(
    margins: NDArray[np.floating], raw: NDArray[np.floating], empty: NDArray[np.bool_]
) -> tuple[float, float]:
    """The highest mean score over all thresholds, and the lowest threshold that reaches it.

    With questions in the order of their margins, the threshold at the k-th margin leaves the first
    k answers and empties the others.
    """
    order = np.argsort(margins, kind="stable")
    totals = empty.sum() + np.concatenate([[0.0], np.cumsum((raw - empty)[order])])
    thresholds = np.concatenate([[margins.min() - 1], margins[order]])
    last_of_ties = np.append(thresholds[1:] > thresholds[:-1], True)
    k = int(np.where(last_of_ties, totals, -np.inf).argmax())
    return float(totals[k] / len(margins)), float(thresholds[k])


def _best(metric: Callable[[str, str], float], text: str, references: Sequence[str]) -> float:
    """The best score over the references; without any, the empty string is the one."""
    usable = [r for r in references if normalise(r)] or [""]
    return max(metric(text, reference) for reference in usable)


def exact(text: str, reference: str) -> float:
    """1 if both say the same."""
    return float(normalise(text) == normalise(reference))


def f1(text: str, reference: str) -> float:
    """``2PR/(P+R)`` of the words that both share, with their multiplicities."""
    found, expected = normalise(text).split(), normalise(reference).split()
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())
