"""Intervals against closed forms, and what they leave out."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import linregress, ttest_1samp

from maha_attn.experiments.definition import Claim
from maha_attn.experiments.results import Result
from maha_attn.report.uncertainty import bleu, estimate, half_width, slope


def result(seed: int = 1, **content: Any) -> Result:
    fixed = {
        "seed": seed,
        "device": "d",
        "commit": "c",
        "date": "2026",
        "data": {"rows": {"test": 400}},
    }
    return Result(Path(f"{seed}.json"), {**fixed, **content})


def score(seed: int, column: str, number: float, **content: Any) -> Result:
    return result(seed, metrics={column: number}, **content)


def test_few_seeds_have_wide_intervals() -> None:
    assert half_width(1, 1) == pytest.approx(12.706, abs=1e-3)
    assert half_width(1, 2) == pytest.approx(4.303, abs=1e-3)
    numbers = [0.3, -0.1, 0.25]
    rows = [score(i, "final_loss", 2 + x) for i, x in enumerate(numbers)]
    than = [score(i, "final_loss", 2.0) for i in range(4)]
    found = estimate("difference", "final_loss", rows, than)
    expected = ttest_1samp(numbers, 0).confidence_interval(0.95)
    assert found is not None
    assert found.seeds == 3
    assert found.missing == ()
    assert found.value + (found.half or 0) == pytest.approx(expected.high)


def test_one_seed_lacks_the_variance_of_seeds() -> None:
    found = estimate(
        "difference",
        "accuracy",
        [score(1, "accuracy", 80.0)],
        [score(1, "accuracy", 70.0)],
    )
    assert found is not None
    assert found.missing == ("seeds",)
    independent = math.sqrt((80 * 20 + 70 * 30) / 400)
    assert found.half == pytest.approx(half_width(independent, 399))


def test_what_both_rows_get_wrong_cancels() -> None:
    """300 examples both right, 60 both wrong, 30 and 10 right in one row alone."""
    first, second = "1" * 330 + "0" * 70, "1" * 300 + "0" * 90 + "1" * 10
    rows = [
        [score(seed, "accuracy", 100 * side.count("1") / 400, correct=side) for seed in (1, 2)]
        for side in (first, second)
    ]
    found = estimate("difference", "accuracy", *rows)
    assert found is not None
    assert found.value == pytest.approx(5.0)
    assert found.over == ("seeds", "sentences")
    discordant, mean = 40 / 400, 0.05
    error = 100 * math.sqrt((discordant - mean**2) / 399)
    assert found.half == pytest.approx(half_width(error, 399))  # the seeds agree


def test_results_by_example_must_be_those_of_the_metric() -> None:
    rows = [score(seed, "forced_f1", 20.0, scores=[0.1, 0.3]) for seed in (1, 2)]
    than = [score(seed, "forced_f1", 10.0, scores=[0.1, 0.1]) for seed in (1, 2)]
    found = estimate("difference", "forced_f1", rows, than)
    assert found is not None
    assert found.over == ("seeds", "questions")
    other = [score(seed, "forced_f1", 11.0, scores=[0.1, 0.1]) for seed in (1, 2)]
    found = estimate("difference", "forced_f1", rows, other)
    assert found is not None
    assert found.missing == ("questions",)


def test_bleu_is_that_of_the_sums_and_sentences_are_a_sample() -> None:
    generator = random.Random(0)
    references = ["the cat sat on the mat by the door", "a dog runs over the wide green field"] * 30

    def garbled(reference: str, chance: float) -> str:
        return " ".join("x" if generator.random() < chance else w for w in reference.split())

    rows, scorer = [], BLEU(effective_order=True)
    for chance in (0.1, 0.2):
        side = [garbled(reference, chance) for reference in references]
        found = [scorer.sentence_score(t, [r]) for t, r in zip(side, references, strict=True)]
        counts = [[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in found]
        expected = BLEU().corpus_score(side, [references]).score
        assert bleu(np.array(counts, float).sum(0)) == pytest.approx(expected)
        rows.append([score(i, "bleu", expected, bleu_statistics=counts) for i in (1, 2)])
    difference = estimate("difference", "bleu", *rows)
    assert difference is not None
    assert difference.missing == ()
    first, second = (np.array(side[0]["bleu_statistics"], float) for side in rows)
    left_out = [
        bleu(first.sum(0) - a) - bleu(second.sum(0) - b) for a, b in zip(first, second, strict=True)
    ]
    jackknife = np.std(left_out) * math.sqrt(len(left_out) - 1)
    assert difference.half == pytest.approx(half_width(float(jackknife), 59), rel=0.15)


def test_texts_without_n_grams_have_no_bleu() -> None:
    """Nor a warning, which is an error here."""
    assert math.isnan(float(bleu(np.array([1.0, 2.0, 0, 0, 0, 0, 1, 0, 0, 0]))))


def test_books_are_a_sample_of_what_held_weights_lose() -> None:
    lost = [0.01, 0.03] * 10
    books = [
        {"nll": 2e3 * math.log(2), "static_nll": (2 + x) * 1e3 * math.log(2), "bytes": 1000}
        for x in lost
    ]
    metrics = {"bits_per_byte": 2.0, "static_bits_per_byte": 2.02}
    row = [result(seed, metrics=metrics, documents=books) for seed in (1, 2)]
    found = estimate("value", "static_cost", row)
    assert found is not None
    assert found.value == pytest.approx(0.02)
    assert found.over == ("seeds", "books")
    assert found.half == pytest.approx(half_width(0.01 / math.sqrt(20), 19), rel=0.08)


def test_speeds_are_compared_at_one_commit_on_one_device() -> None:
    fast, slow = score(1, "tokens_per_s", 2e5), score(1, "tokens_per_s", 1e5)
    found = estimate("reduction", "tokens_per_s", [fast], [slow])
    assert found is not None
    assert found.value == -1
    for name in ("commit", "device"):
        other = score(1, "tokens_per_s", 1e5, **{name: "other"})
        assert estimate("reduction", "tokens_per_s", [fast], [other]) is None
        newer = [
            score(2, "tokens_per_s", speed, date="2027", **{name: "other"}) for speed in (3e5, 1e5)
        ]
        found = estimate("reduction", "tokens_per_s", [fast, newer[0]], [slow, newer[1]])
        assert found is not None
        assert (found.value, found.seeds) == (-2, 1)


def test_slope_of_times_varies_over_runs_and_that_of_counts_does_not() -> None:
    lengths = [8192, 16384, 32768, 65536]
    values = [8.0, 17.0, 31.0, 65.0]
    curves = {"length": lengths, "train_ms": values, "layer_flops": values}
    row = [result(0, curves=curves)]
    fixed = {"text": "t", "source": "s", "measure": "slope", "cases": [], "at_most": 1.25}
    timed, counted = (
        Claim(**fixed, metric=name, between=[8192, 65536]) for name in ("train_ms", "layer_flops")
    )
    line = linregress([math.log(n) for n in lengths], [math.log(v) for v in values])
    once, exactly = slope(timed, row), slope(counted, row)
    assert once is not None
    assert exactly is not None
    assert once.value == exactly.value == pytest.approx(line.slope)
    assert once.missing == ("seeds",)
    assert exactly.half == 0
    faster = [n / 1000 for n in lengths]
    row.append(result(1, curves=curves | {"train_ms": faster}))
    row.append(result(2, curves=curves, device="other"))
    twice = slope(timed, row)
    assert twice is not None
    assert (twice.seeds, twice.missing) == (2, ())
    assert twice.value == pytest.approx((line.slope + 1) / 2)
