"""Extractive question answering: which part of a passage answers a question, if any does."""

from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel

from maha_attn.data.spans import SpanSettings, encode, load_spans
from maha_attn.data.tokenizer import make_tokenizer
from maha_attn.evaluation.predict import predict
from maha_attn.evaluation.spans import Answer, SpanEvaluationSettings, find_answers, span_scores
from maha_attn.models import MahaConfig, MahaForQuestionAnswering
from maha_attn.tasks.base import Task, count
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples

_FOR_MODEL = ["input_ids", "length"]


class QuestionAnswering(Task):
    """Questions about passages, cut into windows; exact match and F1 of SQuAD 2.0."""

    model_class = MahaForQuestionAnswering
    data_class = SpanSettings
    evaluation_class = SpanEvaluationSettings
    purpose = "question-answering"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.parts = load_spans(self.data)
        train = self.parts["train"].rows
        texts = (text for name in ("question", "context") for text in train.unique(name))
        self.tokenizer = make_tokenizer(
            self.data.tokenizer, texts, recipe.model.vocab_size, framed=True
        )
        self.rows = {
            name: encode(part, self.tokenizer, self.data) for name, part in self.parts.items()
        }
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def configure(self, config: MahaConfig) -> None:
        """An answer's start is found by what follows it."""
        config.causal = False

    def describe(self) -> str:
        """Questions and windows."""
        questions = count({name: len(part.rows) for name, part in self.parts.items()}, "questions")
        return f"{questions}, in {sum(map(len, self.rows.values())):,} windows"

    def examples(self, model: PreTrainedModel) -> Examples:
        """A row a window."""
        columns = [*_FOR_MODEL, "start_positions", "end_positions"]
        return Examples(
            train=self.rows["train"].select_columns(columns),
            validation=self.rows["validation"].select_columns(columns),
            tokenizer=self.tokenizer,
            collator=self.collator,
            compute_metrics=self._metrics,
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Exact match and F1, with a threshold for no answer."""
        metrics: dict[str, Any] = {}
        threshold = self.settings.no_answer_threshold
        for name in self.held_out():
            answers = self._answers(name, *self._logits(model, name))
            scores = span_scores(answers, self.parts[name].rows["texts"], threshold or 0.0)
            metrics[name] = scores
            if threshold is None:
                threshold = scores["best_f1_threshold"]
        return {"metrics": metrics}

    def _logits(self, model: PreTrainedModel, name: str) -> tuple[list[Any], list[Any]]:
        """The scores of each window's tokens, as starts and as ends of an answer."""
        rows = self.rows[name].select_columns(_FOR_MODEL)
        starts: list[Any] = [None] * len(rows)
        ends: list[Any] = [None] * len(rows)
        for chosen, output in predict(
            model, rows, self.collator, self.settings.batch_size, f"Answering {name}"
        ):
            for scores, logits in ((starts, output.start_logits), (ends, output.end_logits)):
                for row, values in zip(chosen, logits.float().cpu().numpy(), strict=True):
                    scores[row] = values
        return starts, ends

    def _answers(self, name: str, starts: Any, ends: Any) -> list[Answer]:
        """The best answer to each question of a part."""
        windows = self.rows[name]
        return find_answers(
            list(self.parts[name].rows["context"]),
            list(windows["question"]),
            [np.asarray(offsets) for offsets in windows.with_format("numpy")["offsets"]],
            starts,
            ends,
            self.settings.max_answer_tokens,
        )

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What the Trainer logs and chooses the best model by."""
        answers = self._answers("validation", *prediction.predictions)
        return span_scores(answers, self.parts["validation"].rows["texts"])
