"""Masked language modelling: some tokens are hidden and predicted from all others."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from maha_attn.data.corpus import CorpusSettings
from maha_attn.evaluation.language_modeling import stream
from maha_attn.evaluation.masked import MaskedSettings, masked_scores
from maha_attn.evaluation.scale_usage import scale_usage
from maha_attn.models import MahaForMaskedLM
from maha_attn.tasks.packed import PackedCollator, PackedDocuments
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


@dataclass(frozen=True, kw_only=True)
class MaskedCorpusSettings(CorpusSettings):
    """Documents to learn from and to be judged by, some of whose tokens are hidden.

    Args:
        mask_probability: Part of the tokens to predict: 8 in 10 of them are masked, one is another
            token and one is left as it is (BERT).
    """

    mask_probability: float = 0.15

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        if not 0 < self.mask_probability < 1:
            raise ValueError(
                f"data.mask_probability must lie between 0 and 1, got {self.mask_probability}"
            )


class MaskedLanguageModeling(PackedDocuments):
    """How well hidden tokens are predicted."""

    model_class = MahaForMaskedLM
    causal = False
    data_class = MaskedCorpusSettings
    evaluation_class = MaskedSettings
    usage = (
        "import maha_attn.models, transformers; fill = transformers.pipeline('fill-mask', "
        "{folder!r}); print(fill('A text with ' + fill.tokenizer.mask_token + '.'))"
    )
    framed = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"the tokenizer in {self.data.tokenizer!r} has no mask_token; leave data.tokenizer "
                "out to train one that has"
            )

    def examples(self, model: PreTrainedModel) -> Examples:
        """Packed rows; masks are drawn anew in every epoch."""
        return Examples(
            train=self.rows["train"],
            validation=self.rows["validation"],
            tokenizer=self.tokenizer,
            collator=PackedCollator(self.tokenizer, mlm_probability=self.data.mask_probability),
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity and accuracy of masked tokens, and the use of the scales."""
        scores = {
            name: masked_scores(
                model,
                self.tokenizer,
                self.rows[name],
                self.data.mask_probability,
                self.settings,
            )
            for name in self.held_out()
        }
        text = stream(self.rows["validation"])
        length = self.data.sequence_length
        return {
            "metrics": scores,
            "scale_usage": scale_usage(model, text, length, self.settings.usage_rows),
        }
