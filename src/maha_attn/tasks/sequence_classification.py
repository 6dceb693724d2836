"""Sequence classification: a text, or a pair of texts, has one of several labels."""

from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel

from maha_attn.data.labelled import LabelledSettings, encode, load_labelled
from maha_attn.data.tokenizer import make_tokenizer
from maha_attn.evaluation.classification import (
    ClassificationSettings,
    classification_scores,
    confusion,
)
from maha_attn.evaluation.predict import predict
from maha_attn.models import MahaConfig, MahaForSequenceClassification
from maha_attn.tasks.base import Task, count
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


class SequenceClassification(Task):
    """Labelled texts; accuracy and F1."""

    model_class = MahaForSequenceClassification
    causal = False
    data_class = LabelledSettings
    evaluation_class = ClassificationSettings
    usage = (
        "import maha_attn.models, transformers; "
        "print(transformers.pipeline('text-classification', {folder!r})('A text.'))"
    )

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        labelled = load_labelled(self.data)
        self.labels = labelled.labels
        self.tokenizer = make_tokenizer(
            self.data.tokenizer, labelled.texts(), recipe.model.vocab_size, framed=True
        )
        self.rows = {
            name: encode(part, self.tokenizer, self.data) for name, part in labelled.parts.items()
        }
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def configure(self, config: MahaConfig) -> None:
        """Name the classes."""
        super().configure(config)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: i for i, label in enumerate(self.labels)}

    def require_model(self, model: PreTrainedModel) -> None:
        """Its classes must be the data's."""
        known = list((model.config.id2label or {}).values())
        if known != self.labels:
            raise ValueError(
                f"the data have the classes {', '.join(self.labels)}, and the model was trained "
                f"for {', '.join(known)}; give it data of its own classes, or train it anew"
            )

    def measures(self) -> set[str]:
        """What two texts of two classes are scored by."""
        return set(classification_scores(np.eye(2), np.arange(2)))

    def describe(self) -> str:
        """Texts by part, and the classes."""
        texts = count({name: len(rows) for name, rows in self.rows.items()}, "texts")
        return f"{texts}, labelled {', '.join(self.labels)}"

    def examples(self, model: PreTrainedModel) -> Examples:
        """A row a text."""
        return Examples(
            train=self.rows["train"],
            validation=self.rows["validation"],
            tokenizer=self.tokenizer,
            collator=self.collator,
            compute_metrics=_metrics,
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracy, F1 and the confusion matrix.

        Of every example, in order, whether it was ``correct``: a string of 0 and 1.
        """
        metrics, confusions, examples = {}, {}, {}
        for name in self.held_out():
            rows = self.rows[name]
            labels = np.array(rows["label"])
            logits = np.zeros((len(rows), len(self.labels)))
            outputs = predict(
                model, rows, self.collator, self.settings.batch_size, f"Classifying {name}"
            )
            for chosen, output in outputs:
                logits[chosen] = output.logits.float().cpu().numpy()
            metrics[name] = classification_scores(logits, labels)
            confusions[name] = confusion(logits, labels)
            correct = logits.argmax(-1) == labels
            examples[name] = {"correct": "".join("01"[int(right)] for right in correct)}
        return {
            "metrics": metrics,
            "labels": self.labels,
            "confusion": confusions,
            "examples": examples,
        }


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What the Trainer logs and chooses the best model by."""
    return classification_scores(
        np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    )
