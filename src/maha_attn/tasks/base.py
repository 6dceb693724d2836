"""What a task is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maha_attn.evaluation.generation import GenerationSettings, generate_texts
from maha_attn.models import MahaConfig
from maha_attn.training.recipe import Recipe
from maha_attn.training.train import Examples


class Task(ABC):
    """Data that is loaded, checked and tokenised, and how a model is judged by it.

    A task is made once for a recipe, whatever the number of its seeds. Making it reads and checks
    everything that a user can get wrong, so that nothing fails once training has started.

    Args:
        recipe: Its ``data`` and ``evaluation`` are of the task's classes.

    Raises:
        ValueError: Something in the data is missing or wrong.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    data_class: ClassVar[type]
    evaluation_class: ClassVar[type]
    causal: ClassVar[bool | None] = None
    """Whether a token of its models sees earlier ones alone; None: the model knows."""
    pads: ClassVar[bool] = True
    """Whether rows of one batch differ in length."""
    usage: ClassVar[str] = ""
    """Python that uses a saved model which writes no text; ``{folder!r}`` is where it is."""

    tokenizer: PreTrainedTokenizerFast
    rows: dict[str, Dataset]
    """Rows of tokens by part: train, validation, and test if there is one."""

    def __init__(self, recipe: Recipe) -> None:
        self.data: Any = recipe.data
        self.settings: Any = recipe.evaluation
        self.generation: GenerationSettings = recipe.generation

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The classes of a recipe's sections."""
        return {
            "model": cls.model_class.config_class,  # pyright: ignore[reportReturnType]
            "data": cls.data_class,
            "evaluation": cls.evaluation_class,
            "generation": GenerationSettings,
        }

    def configure(self, config: MahaConfig) -> None:
        """Set what the task decides about the model, beside its vocabulary."""
        if self.causal is not None:
            config.causal = self.causal

    @property
    def longest(self) -> int:
        """Tokens that a row may have."""
        return self.data.max_length

    def require_model(self, model: PreTrainedModel) -> None:  # noqa: B027 - most need nothing
        """Check that a trained model can be judged by this data.

        Raises:
            ValueError: It was trained for something else.
        """

    def measures(self) -> set[str]:
        """What is measured on the validation part beside the loss, while a model is trained."""
        return set()

    @abstractmethod
    def describe(self) -> str:
        """What is trained on and what is held out, in a few words."""

    @abstractmethod
    def examples(self, model: PreTrainedModel) -> Examples:
        """What the Trainer is given to train ``model``."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Score a trained model.

        Returns:
            What evaluation.json holds: ``metrics``, numbers by part and name, and what else is
            worth keeping.
        """

    def held_out(self) -> list[str]:
        """The parts that a model is judged by."""
        return [name for name in self.rows if name != "train"]

    @classmethod
    def generate(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        settings: GenerationSettings,
    ) -> str:
        """What the model makes of a prompt.

        Raises:
            ValueError: It writes no text.
        """
        if not model.can_generate():
            raise ValueError(
                f"a {type(model).__name__} writes no text; use it in Python: "
                + cls.usage.format(folder=model.name_or_path)
            )
        return generate_texts(model, tokenizer, [settings.prompt], settings)[0]


def count(parts: dict[str, int], what: str) -> str:
    """``871 sentences to train on, 100 for validation``."""
    rest = "".join(f", {n:,} for {name}" for name, n in parts.items() if name != "train")
    return f"{parts['train']:,} {what} to train on{rest}"
