"""How good translations are: BLEU and chrF by sacreBLEU, with the signatures that define them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


@dataclass(frozen=True, kw_only=True)
class TranslationSettings:
    """How translations are scored.

    Args:
        batch_size: Sentences at once.
        samples: Sentences to show with their translations.
    """

    batch_size: int = 64
    samples: int = 3


def translation_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU and chrF, 0 to 100, and their signatures."""
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(translations, [references]).score,
        "chrf": chrf.corpus_score(translations, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def bleu_statistics(translations: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """What corpus BLEU sums up, of each sentence; a resample of sentences has that of its sums.

    Returns:
        For each ``[length, reference's length, matching n-grams …, n-grams …]``, n from 1 to 4.
    """
    bleu = BLEU(effective_order=True)  # Of a sentence alone; the counts are the same.
    scores = (bleu.sentence_score(t, [r]) for t, r in zip(translations, references, strict=True))
    return [[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores]
