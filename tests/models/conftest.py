"""Small models for every test here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from maha_attn.models import MahaConfig, MahaForCausalLM, MahaForMaskedLM


class Tiny:
    """Makes small models and inputs for them.

    Weights are wide (0.6) and embeddings untied: a narrow, tied model repeats its last token
    whatever its cache holds, and comparisons of generated text pass vacuously.
    """

    vocab_size = 61

    def config(self, **options: Any) -> MahaConfig:
        defaults: dict[str, Any] = {
            "vocab_size": self.vocab_size,
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
        return MahaConfig(**(defaults | options))

    def lm(self, **options: Any) -> MahaForCausalLM:
        torch.manual_seed(0)
        return MahaForCausalLM(self.config(**options)).eval()

    def mlm(self, **options: Any) -> MahaForMaskedLM:
        torch.manual_seed(0)
        return MahaForMaskedLM(self.config(**options)).eval()

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
