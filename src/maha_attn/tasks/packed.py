"""What both kinds of language modelling share: documents, packed into rows."""

from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling

from maha_attn.data.corpus import load_documents, pack
from maha_attn.data.tokenizer import make_tokenizer
from maha_attn.tasks.base import Task
from maha_attn.training.recipe import Recipe


class PackedDocuments(Task):
    """Documents, tokenised and packed into rows."""

    pads = False
    framed: ClassVar[bool]
    """Whether the tokenizer has START and MASK."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.documents = load_documents(self.data)
        self.tokenizer = make_tokenizer(
            self.data.tokenizer,
            iter(self.documents["train"].rows["text"]),
            recipe.model.vocab_size,
            self.framed,
        )
        self.rows = {
            name: pack(part, self.tokenizer, self.data) for name, part in self.documents.items()
        }
        tokens, length = len(self.rows["train"][0]["input_ids"]), self.data.sequence_length
        if tokens < length:
            raise ValueError(
                f"data.train holds {tokens} tokens, less than one row of {length} "
                "(data.sequence_length): give more text, or lower data.sequence_length"
            )

    @property
    def longest(self) -> int:
        """Every row has as many tokens."""
        return self.data.sequence_length

    def describe(self) -> str:
        """Characters and documents."""
        characters = {
            name: sum(map(len, tqdm(part.rows["text"], f"Counting {name}", delay=2)))
            for name, part in self.documents.items()
        }
        held_out = ", ".join(
            f"{n:,} for {part}" for part, n in characters.items() if part != "train"
        )
        return (
            f"{characters['train']:,} characters of {len(self.documents['train'].rows)} "
            f"document(s) to train on, {held_out}"
        )


class PackedCollator(DataCollatorForLanguageModeling):
    """Leaves out the mask of a batch without padding: the model need not look for any."""

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Rows to a batch."""
        batch = super().torch_call(examples)
        if batch["attention_mask"].all():
            del batch["attention_mask"]
        return batch
