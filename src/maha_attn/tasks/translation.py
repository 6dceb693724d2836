"""Translation: a sentence is written anew in another language."""

from typing import Any

from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from maha_attn.data.parallel import ParallelSettings, encode, load_parallel, texts
from maha_attn.data.tokenizer import make_tokenizer
from maha_attn.evaluation.generation import generate_texts
from maha_attn.evaluation.translation import (
    TranslationSettings,
    bleu_statistics,
    translation_scores,
)
from maha_attn.models import MahaForSeq2SeqLM
from maha_attn.tasks.base import Task, count
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


class Translation(Task):
    """Pairs of a sentence and its translation; BLEU."""

    model_class = MahaForSeq2SeqLM
    data_class = ParallelSettings
    evaluation_class = TranslationSettings

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.parts = load_parallel(self.data)
        self.tokenizer = make_tokenizer(
            self.data.tokenizer, texts(self.parts), recipe.model.vocab_size, framed=True
        )
        self.rows = {
            name: encode(part, self.tokenizer, self.data) for name, part in self.parts.items()
        }

    def describe(self) -> str:
        """Sentences by part."""
        return count({name: len(rows) for name, rows in self.rows.items()}, "sentences")

    def examples(self, model: PreTrainedModel) -> Examples:
        """A row a sentence, with its translation as labels."""
        return Examples(
            train=self.rows["train"],
            validation=self.rows["validation"],
            tokenizer=self.tokenizer,
            collator=DataCollatorForSeq2Seq(self.tokenizer, model),
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """BLEU and chrF of what the model writes by the recipe's generation settings.

        Of every sentence, in order, its ``bleu_statistics``.
        """
        metrics, examples, signatures, samples = {}, {}, {}, []
        for name in self.held_out():
            rows = self.parts[name].rows
            sources, references = list(rows["source"]), list(rows["target"])
            found = self._translate(model, sources, f"Translating {name}")
            scores = translation_scores(found, references)
            signatures = {key: scores.pop(key) for key in ("bleu_signature", "chrf_signature")}
            metrics[name] = scores
            examples[name] = {"bleu_statistics": bleu_statistics(found, references)}
            some = slice(self.settings.samples)
            for source, text, reference in zip(
                sources[some], found[some], references[some], strict=True
            ):
                samples.append({"source": source, "translation": text, "reference": reference})
        return {
            "metrics": metrics,
            "signatures": signatures,
            "samples": samples,
            "examples": examples,
        }

    def _translate(self, model: PreTrainedModel, sources: list[str], what: str) -> list[str]:
        """The translations, made in batches of sentences of about one length."""
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        found = [""] * len(sources)
        size = self.settings.batch_size
        for start in tqdm(range(0, len(order), size), desc=what, delay=2):
            chosen = order[start : start + size]
            batch = generate_texts(
                model, self.tokenizer, [sources[i] for i in chosen], self.generation
            )
            for i, text in zip(chosen, batch, strict=True):
                found[i] = text
        return found
