"""Masked tokens: a model that knows nothing, one that knows all, the same masks every time."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from maha_attn.data.tokenizer import train_tokenizer
from maha_attn.evaluation.masked import MaskedSettings, masked_scores

TOKENIZER = train_tokenizer(["abc " * 20], 270, framed=True)
SIZE = len(TOKENIZER)
ROWS = Dataset.from_dict({"input_ids": [[9 + i for i in range(40)] for _ in range(5)]})


class Guess(torch.nn.Module):
    """Gives every token the same probability, or nearly all to the true one."""

    device = torch.device("cpu")

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        true = torch.arange(9, 49).expand(len(input_ids), -1)
        return SimpleNamespace(logits=self.knows * 50.0 * torch.nn.functional.one_hot(true, SIZE))


def test_scores_of_guessing_and_knowing() -> None:
    blind = masked_scores(Guess(False), TOKENIZER, ROWS, 0.3, MaskedSettings(batch_size=2))  # pyright: ignore[reportArgumentType]
    assert blind["masked_perplexity"] == pytest.approx(SIZE)
    assert 30 < blind["masked_tokens"] < 90
    sure = masked_scores(Guess(True), TOKENIZER, ROWS, 0.3, MaskedSettings(batch_size=2))  # pyright: ignore[reportArgumentType]
    assert sure["masked_perplexity"] == pytest.approx(1)
    assert sure["masked_accuracy"] == 100
    assert sure["masked_tokens"] == blind["masked_tokens"]
