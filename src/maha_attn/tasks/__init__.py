"""The tasks: what is particular to each, behind one interface, and the runs that it makes."""

from maha_attn.tasks.base import Task
from maha_attn.tasks.language_modeling import LanguageModeling
from maha_attn.tasks.masked_language_modeling import MaskedLanguageModeling
from maha_attn.tasks.question_answering import QuestionAnswering
from maha_attn.tasks.sequence_classification import SequenceClassification
from maha_attn.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    "language_modeling": LanguageModeling,
    "masked_language_modeling": MaskedLanguageModeling,
    "sequence_classification": SequenceClassification,
    "question_answering": QuestionAnswering,
    "translation": Translation,
}
"""By the name that a recipe's ``task`` has."""

__all__ = ["TASKS", "Task"]
