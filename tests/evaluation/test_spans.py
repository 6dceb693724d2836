"""SQuAD 2.0's measures against the official script, and against its definitions by hand."""

from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

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
    forced_f1,
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


def test_scores_of_the_questions_that_have_an_answer() -> None:
    answers = [Answer("the cat sat", 9.0), Answer("mat", 9.0), Answer("dog", -9.0)]
    references = [["cat sat"], [], ["a mat", "big dog"]]
    scores = forced_f1(answers, references)
    assert scores == pytest.approx([1, 2 / 3])
    assert 100 * sum(scores) / 2 == pytest.approx(span_scores(answers, references)["forced_f1"])


def test_parts_without_one_kind_of_question() -> None:
    answers = [Answer("cat", -1.0)]
    assert "no_answer_exact" not in span_scores(answers, [["cat"]])
    assert not {"has_answer_exact", "forced_exact"} & set(span_scores(answers, [[]]))


OFFICIAL = "transformers==4.57.6", "src/transformers/data/metrics/squad_metrics.py"
"""The last release of transformers that had the official script's functions."""


@pytest.fixture(scope="session")
def official(fetch_source: Any) -> Any:
    spec = spec_from_file_location("transformers.data.metrics.squad", fetch_source(*OFFICIAL))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORDS = [
    "the",
    "a",
    "An",
    "cat",
    "Cat's",
    "cats",
    "1066,",
    "U.S.",
    "in",
    "naïve",
    "—",
    "",
    "the cat",
]


def random_cases(seed: int) -> tuple[list[Answer], list[list[str]]]:
    """Questions with answers, without, and with answers that normalise to nothing."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, 5)))

    size = rng.integers(1, 30)
    answers = [Answer(text(), float(margin)) for margin in rng.permutation(size) - size / 2]
    return answers, [[text() for _ in range(rng.integers(0, 4))] for _ in range(size)]


@pytest.mark.parametrize("threshold", [0.0, -3.0, 99.0])
def test_scores_are_the_official_ones(official: Any, threshold: float) -> None:
    for seed in range(200):
        answers, references = random_cases(seed)
        questions = [
            SimpleNamespace(qas_id=i, answers=[{"text": text} for text in texts])
            for i, texts in enumerate(references)
        ]
        texts = {i: answer.text for i, answer in enumerate(answers)}
        margins = {i: answer.no_answer_margin for i, answer in enumerate(answers)}
        expected = official.squad_evaluate(questions, texts, margins, threshold)
        found = span_scores(answers, references, threshold)
        assert found["exact"] == pytest.approx(expected["exact"])
        assert found["f1"] == pytest.approx(expected["f1"])
        for ours, theirs in (
            ("has_answer_exact", "HasAns_exact"),
            ("has_answer_f1", "HasAns_f1"),
            ("no_answer_exact", "NoAns_exact"),
        ):
            assert (ours in found) == (theirs in expected)
            if ours in found:
                assert found[ours] == pytest.approx(expected[theirs])
        # The script's search counts an answer of articles alone as wrong where there is none,
        # though its scores do not.
        if all(normalise(answer.text) or not answer.text for answer in answers):
            for name in ("exact", "f1"):
                assert found[f"best_{name}"] == pytest.approx(expected[f"best_{name}"])


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
