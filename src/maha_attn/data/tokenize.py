"""Texts to tokens, in as many processes as asked for; datasets keeps the result in its cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from maha_attn.data.source import Names, Part, SourceSettings


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(SourceSettings):
    """Examples to learn from and to be judged by, each of them a row of tokens or a few.

    Args:
        validation: Split or files to be judged by.
        tokenizer: Folder of a byte-level tokenizer. Left out, it is that of the pretrained model,
            or without one a new one of model.vocab_size tokens, trained on the training part.
        max_length: Tokens that a row may have, the special tokens around texts included.
    """

    validation: Names  # pyright: ignore[reportGeneralTypeIssues] - required here
    tokenizer: str | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        """Check what types do not say."""
        super().__post_init__()
        if not self.validation:
            raise ValueError("data.validation must name at least one split or file, got none")
        if self.max_length < 4:
            raise ValueError(f"data.max_length must be at least 4, got {self.max_length}")


def tokenise(
    part: Part,
    function: Callable[..., dict[str, list[Any]]],
    tokenizer: PreTrainedTokenizerFast,
    settings: SourceSettings,
    batch_size: int = 1000,
    **options: Any,
) -> Dataset:
    """Map a function over batches of examples; the same call on the same data works once.

    Args:
        part: The examples.
        function: ``function(batch, tokenizer_json=…, **options)`` returns columns; it is a function
            of a module, whose arguments are all that it depends on.
        tokenizer: Travels as JSON, which does not change with use as the object does.
        settings: How many processes.
        batch_size: Examples at once in memory.
        options: More arguments of ``function``.
    """
    rows = part.rows.map(
        function,
        batched=True,
        batch_size=batch_size,
        remove_columns=part.rows.column_names,
        num_proc=settings.num_proc if settings.num_proc > 1 else None,
        fn_kwargs={"tokenizer_json": tokenizer.backend_tokenizer.to_str(), **options},
        desc=f"Tokenising {part.name}",
    )
    return cast(Dataset, rows)


def refuse_long_rows(
    part: Part, rows: Dataset, max_length: int, longest_field: Callable[[int], str]
) -> None:
    """Refuse a part with a row of more than ``max_length`` tokens, by the column ``length``.

    Args:
        part: The examples.
        rows: Their tokens.
        max_length: Of ``data.max_length``.
        longest_field: Of a row of ``part``, the field to blame.
    """
    lengths = np.array(rows["length"])
    if (lengths > max_length).any():
        row = int((lengths > max_length).argmax())
        part.refuse(
            row,
            longest_field(row),
            f"the row has {lengths[row]} tokens (the longest of {part.name} has {lengths.max()}), "
            f"data.max_length is {max_length}; raise it, or set data.truncate to cut such rows",
        )
