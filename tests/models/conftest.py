"""Small models for every test here."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from maha_attn.models import (
    MahaConfig,
    MahaForCausalLM,
    MahaForMaskedLM,
    MahaForQuestionAnswering,
    MahaForSeq2SeqLM,
    MahaForSequenceClassification,
    MahaSeq2SeqConfig,
)


class Tiny:
    """Makes small models and inputs for them.

    Weights are wide (0.6) and embeddings untied: a narrow, tied model repeats its last token
    whatever its cache holds, and comparisons of generated text pass vacuously.
    """

    vocab_size = 61

    options: ClassVar[dict[str, Any]] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_scales": 3,
        "window": 4,
        "initializer_range": 0.6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }

    def config(self, **options: Any) -> MahaConfig:
        return MahaConfig(**(self.options | options))

    def seq2seq_config(self, **options: Any) -> MahaSeq2SeqConfig:
        return MahaSeq2SeqConfig(**(self.options | {"decoder_start_token_id": 0} | options))

    def lm(self, **options: Any) -> MahaForCausalLM:
        torch.manual_seed(0)
        return MahaForCausalLM(self.config(**options)).eval()

    def mlm(self, **options: Any) -> MahaForMaskedLM:
        torch.manual_seed(0)
        return MahaForMaskedLM(self.config(**options)).eval()

    def classifier(self, **options: Any) -> MahaForSequenceClassification:
        torch.manual_seed(0)
        return MahaForSequenceClassification(self.config(**options)).eval()

    def qa(self, **options: Any) -> MahaForQuestionAnswering:
        torch.manual_seed(0)
        return MahaForQuestionAnswering(self.config(**options)).eval()

    def seq2seq(self, **options: Any) -> MahaForSeq2SeqLM:
        torch.manual_seed(0)
        return MahaForSeq2SeqLM(self.seq2seq_config(**options)).eval()

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        """Token ids, none of them padding (0)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.vocab_size, shape, generator=generator)

    def pad(self, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        """Rows ``[n]`` in one batch: ids and attention mask."""
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            part = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[i, part], mask[i, part] = row, 1
        return ids, mask


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def learn() -> Callable[..., None]:
    """Train a model on one batch until it has it by heart."""

    def learn(model: PreTrainedModel, steps: int = 40, **batch: Tensor) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        model.train()
        for _ in range(steps):
            loss = model(**batch).loss
            loss.backward()
            assert all(p.grad is not None for p in model.parameters()), (
                "a parameter has no gradient"
            )
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    return learn
