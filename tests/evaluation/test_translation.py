"""BLEU: sacreBLEU's number and the signature that defines it."""

import pytest

from maha_attn.evaluation.translation import translation_scores

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
