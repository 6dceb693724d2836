"""Training with ``loss_chunk``: the same loss and gradients as without, in every model with it."""

from typing import Any

import pytest
import torch

from maha_attn.models import (
    MahaConfig,
    MahaForCausalLM,
    MahaForMaskedLM,
    MahaForSeq2SeqLM,
    MahaSeq2SeqConfig,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_scales": 2,
    "window": 4,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("kind", [MahaForCausalLM, MahaForMaskedLM, MahaForSeq2SeqLM])
def test_same_loss_and_gradients(kind: Any, items: int | None) -> None:
    is_seq2seq = kind is MahaForSeq2SeqLM
    config_class: Any = MahaSeq2SeqConfig if is_seq2seq else MahaConfig
    options = {**SIZES, "decoder_start_token_id": 1} if is_seq2seq else SIZES
    ids = torch.randint(2, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3:7] = -100
    found = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        model = kind(config_class(**options, loss_chunk=chunk)).train()
        output = model(input_ids=ids, labels=labels, num_items_in_batch=items)
        assert (output.logits is None) == (chunk is not None)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss, gradients))
        assert model.eval()(input_ids=ids, labels=labels).logits is not None
    (loss, gradients), (chunked_loss, chunked_gradients) = found
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == chunked_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_bad_chunk() -> None:
    with pytest.raises(ValueError, match="loss_chunk must be at least 1, got 0"):
        MahaConfig(**SIZES, loss_chunk=0)  # pyright: ignore[reportArgumentType]
