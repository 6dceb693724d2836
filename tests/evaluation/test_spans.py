"""SQuAD 2.0's measures against the official script's definitions, written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maha_attn.evaluation.spans import (
    Answer,
    best_span,
    exact,
    f1,
    find_answers,
    normalise,
    span_scores,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's tail.", "cats tail"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("the", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "reference", "is_exact", "overlap"),
    [
        ("the Norman Conquest", "Norman conquest", 1, 1),
        ("Norman", "the Norman conquest", 0, 2 / 3),
        ("in 1066 in France", "in 1066", 0, 2 * 0.5 * 1 / 1.5),
        ("1066", "1067", 0, 0),
        ("", "", 1, 1),
        ("a", "", 1, 1),
        ("cat", "", 0, 0),
    ],
)
def test_exact_and_f1(text: str, reference: str, is_exact: float, overlap: float) -> None:
    assert exact(text, reference) == is_exact
    assert f1(text, reference) == pytest.approx(overlap)


def test_scores_by_hand() -> None:
    answers = [Answer("the cat", -2.0), Answer("dog", 1.0), Answer("fish", -1.0), Answer("x", 3.0)]
    references = [["cat", "a dog"], ["black dog"], [], []]
    found = span_scores(answers, references)
    # 1 right; 2 emptied, wrong; 3 kept, wrong; 4 emptied, right
    assert found["exact"] == found["f1"] == 50
    assert found["has_answer_exact"] == 50
    assert found["no_answer_exact"] == 50
    # answers 1 and 2, the margins aside
    assert found["forced_exact"] == 50
    assert found["forced_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    # threshold -2: 1 kept, the others emptied: 1, 3 and 4 right
    assert (found["best_exact"], found["best_exact_threshold"]) == (75, -2)
    kept = span_scores(answers, references, threshold=2.0)
    assert kept["has_answer_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert kept["has_answer_exact"] == 50


def test_parts_without_one_kind_of_question() -> None:
    answers = [Answer("cat", -1.0)]
    assert "no_answer_exact" not in span_scores(answers, [["cat"]])
    assert not {"has_answer_exact", "forced_exact"} & set(span_scores(answers, [[]]))


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from(["a b", "b", ""]), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_best_threshold_is_the_best_of_all(cases: list[tuple[int, str, bool]]) -> None:
    answers = [Answer(text, float(margin)) for margin, text, _ in cases]
    references = [["b c"] if answerable else [] for _, _, answerable in cases]
    found = span_scores(answers, references)
    for name in ("exact", "f1"):
        scores = [span_scores(answers, references, t / 2)[name] for t in range(-9, 9)]
        assert found[f"best_{name}"] == pytest.approx(max(scores))
        at = found[f"best_{name}_threshold"]
        assert span_scores(answers, references, at)[name] == pytest.approx(max(scores))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_best_span_is_the_best_of_all(length: int, longest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, length))
    inside = rng.random(length) < 0.7
    inside[rng.integers(length)] = True
    spans = {
        (i, j): start[i] + end[j]
        for i in range(length)
        for j in range(i, min(i + longest, length))
        if inside[i] and inside[j]
    }
    i, j, score = best_span(start, end, inside, longest)
    assert score == pytest.approx(max(spans.values()))
    assert spans[i, j] == score


def test_the_best_window_answers_and_the_surest_decides() -> None:
    context = "the cat sat on a mat"
    offsets = [
        np.array([[-1, -1], [0, 3], [3, 7], [-1, -1]]),
        np.array([[-1, -1], [16, 20], [-1, -1]]),
    ]
    # window 1: START 1+1, " cat" 3+3; window 2: START 4+0, " mat" 2+5; padding is never read
    starts = [np.array([1.0, 0, 3, 9, 99]), np.array([4.0, 2, 9, 99])]
    ends = [np.array([1.0, 0, 3, 9, 99]), np.array([0.0, 5, 9, 99])]
    (answer,) = find_answers([context], [0, 0], offsets, starts, ends, 5)
    assert answer == Answer("mat", 2 - 7, start=17)
