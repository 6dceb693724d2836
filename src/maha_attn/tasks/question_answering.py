"""Extractive question answering: which part of a passage answers a question, if any does."""

from typing import Any

from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel

from maha_attn.data.spans import SpanSettings, encode, load_spans
from maha_attn.data.tokenizer import make_tokenizer
from maha_attn.evaluation.answering import FOR_MODEL, window_answers, window_logits
from maha_attn.evaluation.spans import Answer, SpanEvaluationSettings, forced_f1, span_scores
from maha_attn.models import MahaForQuestionAnswering
from maha_attn.tasks.base import Task, count
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


class QuestionAnswering(Task):
    """Questions about passages, cut into windows; exact match and F1 of SQuAD 2.0."""

    model_class = MahaForQuestionAnswering
    causal = False  # An answer's start is found by what follows it.
    data_class = SpanSettings
    evaluation_class = SpanEvaluationSettings
    usage = (
        "import maha_attn.models, transformers as t; "
        "from maha_attn.evaluation.answering import answer_questions; "
        "model = t.AutoModelForQuestionAnswering.from_pretrained({folder!r}); "
        "tokenizer = t.AutoTokenizer.from_pretrained({folder!r}); "
        "print(answer_questions(model, tokenizer, ['A question?'], ['A passage.']))"
    )

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

    def measures(self) -> set[str]:
        """What two questions, one without an answer, are scored by."""
        return set(span_scores([Answer("yes", 0.0), Answer("", 0.0)], [["yes"], []]))

    def describe(self) -> str:
        """Questions and windows."""
        questions = count({name: len(part.rows) for name, part in self.parts.items()}, "questions")
        return f"{questions}, in {sum(map(len, self.rows.values())):,} windows"

    def examples(self, model: PreTrainedModel) -> Examples:
        """A row a window."""
        columns = [*FOR_MODEL, "start_positions", "end_positions"]
        return Examples(
            train=self.rows["train"].select_columns(columns),
            validation=self.rows["validation"].select_columns(columns),
            tokenizer=self.tokenizer,
            collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=self._metrics,
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Exact match and F1, with a threshold for no answer.

        Of every question that has an answer, in order, its ``scores``, of which ``forced_f1`` is
        the mean (from 0 to 1).
        """
        metrics: dict[str, Any] = {}
        examples: dict[str, Any] = {}
        threshold = self.settings.no_answer_threshold
        for name in self.held_out():
            logits = window_logits(
                model,
                self.tokenizer,
                self.rows[name],
                self.settings.batch_size,
                f"Answering {name}",
            )
            answers = self._answers(name, *logits)
            references = self.parts[name].rows["texts"]
            scores = span_scores(answers, references, threshold or 0.0)
            metrics[name] = scores
            examples[name] = {"scores": [round(f, 4) for f in forced_f1(answers, references)]}
            if threshold is None:
                threshold = scores["best_f1_threshold"]
        return {"metrics": metrics, "examples": examples}

    def _answers(self, name: str, starts: Any, ends: Any) -> list[Answer]:
        """The best answer to each question of a part."""
        contexts = list(self.parts[name].rows["context"])
        longest = self.settings.max_answer_tokens
        return window_answers(self.rows[name], contexts, starts, ends, longest)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What the Trainer logs and chooses the best model by."""
        answers = self._answers("validation", *prediction.predictions)
        return span_scores(answers, self.parts["validation"].rows["texts"])
