"""Language modelling: each token of a document is predicted from those before it."""

from dataclasses import asdict
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from maha_attn.data.corpus import CorpusSettings
from maha_attn.evaluation.language_modeling import PerplexitySettings, score_text, stream
from maha_attn.evaluation.scale_usage import scale_usage
from maha_attn.models import MahaForCausalLM
from maha_attn.tasks.packed import PackedCollator, PackedDocuments
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


class LanguageModeling(PackedDocuments):
    """Perplexity beside that of counting."""

    model_class = MahaForCausalLM
    causal = True
    data_class = CorpusSettings
    evaluation_class = PerplexitySettings
    framed = False

    def __init__(self, recipe: Recipe) -> None:
        recipe.evaluation.check(recipe.data.sequence_length)
        super().__init__(recipe)
        if self.settings.harness_tasks:
            _harness().find_tasks(self.settings.harness_tasks)

    def examples(self, model: PreTrainedModel) -> Examples:
        """Packed rows."""
        return Examples(
            train=self.rows["train"],
            validation=self.rows["validation"],
            tokenizer=self.tokenizer,
            collator=PackedCollator(self.tokenizer, mlm=False),
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Score the held-out text, and add a sample and what the harness found.

        Returns:
            ``metrics`` by part; ``held_out``, ``perplexities`` and ``smoothing`` of the validation
            part as :func:`score_text` has them, those of the ``test`` part if there is one;
            ``scale_usage``; ``sample``, a generated passage; ``harness`` if asked for.
        """
        length = self.data.sequence_length
        scores = {
            name: score_text(
                model, self.tokenizer, self.rows["train"], self.rows[name], length, self.settings
            )
            for name in self.held_out()
        }
        text = stream(self.rows["validation"])
        result = {
            "metrics": {name: score["perplexities"]["maha"] for name, score in scores.items()},
            **scores.pop("validation"),
            **scores,
            "scale_usage": scale_usage(model, text, length, self.settings.usage_rows),
            "sample": {
                **asdict(self.generation),
                "text": self.generate(model, self.tokenizer, self.generation),
            },
        }
        if self.settings.harness_tasks:
            result["harness"] = _harness().run_harness(
                model, self.tokenizer, self.settings.harness_tasks, self.settings.batch_size
            )
        return result


def _harness() -> ModuleType:
    """What runs lm-evaluation-harness, imported where it is asked for."""
    try:
        from maha_attn.evaluation import harness
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation.harness_tasks: {error.name} is not installed; "
            "pip install 'maha-attn[lm_eval]', or leave it out"
        ) from error
    return harness
