"""BLEU: sacreBLEU's number and the signature that defines it."""

import pytest
from sacrebleu.metrics.bleu import BLEU

from maha_attn.evaluation.translation import bleu_statistics, translation_scores

REFERENCES = ["Ein Hund läuft durch den Schnee.", "Zwei Frauen lachen."]


def test_perfect_and_worthless() -> None:
    perfect = translation_scores(REFERENCES, REFERENCES)
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["chrf"] == pytest.approx(100)
    assert translation_scores(["", ""], REFERENCES)["bleu"] == 0


def test_signatures_say_how() -> None:
    found = translation_scores(REFERENCES, REFERENCES)
    assert "tok:13a" in found["bleu_signature"]
    assert "version:" in found["bleu_signature"]
    assert "nc:6" in found["chrf_signature"]


def test_sums_of_the_sentences_give_the_score_of_the_corpus() -> None:
    found = ["Ein Hund läuft durch den tiefen Schnee.", "Zwei Frauen lachen laut."]
    rows = bleu_statistics(found, REFERENCES)
    length, reference, *counts = (sum(column) for column in zip(*rows, strict=True))
    score = BLEU.compute_bleu(counts[:4], counts[4:], length, reference).score
    assert score == pytest.approx(translation_scores(found, REFERENCES)["bleu"])
    assert 20 < score < 90
