"""Models on a GPU in bf16: masked cross-attention, every head's gradients, generation."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformers")

from maha_attn.layers.cross_attention import CrossAttention
from maha_attn.models import (
    MahaConfig,
    MahaForQuestionAnswering,
    MahaForSeq2SeqLM,
    MahaForSequenceClassification,
    MahaSeq2SeqConfig,
)

pytestmark = pytest.mark.gpu
OPTIONS = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_scales": 3,
    "window": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def batch(rows=4, length=100):
    torch.manual_seed(0)
    ids = torch.randint(2, 500, (rows, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 60:] = mask[1, :30] = mask[2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_cross_attention_is_at_most_twice_as_far_from_fp64_as_the_formula(masked):
    torch.manual_seed(0)
    layer = CrossAttention(128, 2).cuda()
    x, memory = (torch.randn(3, n, 128, device="cuda") for n in (65, 130))
    mask = torch.ones(3, 130, dtype=torch.bool, device="cuda")
    if masked:
        mask[0, 70:] = mask[1, :99] = False

    def formula(layer, x, memory):
        k, v = layer.project(memory)
        q = layer.q_proj(x).unflatten(-1, (2, 64)).transpose(1, 2)
        scores = (q @ k.mT / 8).masked_fill(~mask[:, None, None], -torch.inf)
        return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    exact = formula(layer.double(), x.double(), memory.double())
    layer, x, memory = layer.bfloat16(), x.bfloat16(), memory.bfloat16()
    ours = layer(x, *layer.project(memory), mask if masked else None)
    error, plain = ((y - exact).abs().max() for y in (ours, formula(layer, x, memory)))
    assert error <= 2 * plain


@pytest.mark.parametrize("head", ["classification", "answering", "seq2seq"])
def test_gradients_are_finite_with_padding_and_a_row_of_padding(head):
    inputs = batch()
    labels = torch.arange(4, device="cuda")
    if head == "classification":
        model = MahaForSequenceClassification(MahaConfig(causal=False, num_labels=4, **OPTIONS))
        inputs["labels"] = labels
    elif head == "answering":
        model = MahaForQuestionAnswering(MahaConfig(causal=False, **OPTIONS))
        inputs |= {"start_positions": labels + 31, "end_positions": labels + 40}
    else:
        model = MahaForSeq2SeqLM(MahaSeq2SeqConfig(decoder_start_token_id=0, **OPTIONS))
        inputs["labels"] = inputs["input_ids"][:, :50]
    model = model.cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# In fp64, which kernels don't serve, since rounding must not decide between two words.
@pytest.mark.filterwarnings("ignore:PyTorch operators run")
@pytest.mark.parametrize("beams", [1, 3])
def test_translation_generates_the_same_text_without_a_cache(beams):
    torch.manual_seed(0)
    config = MahaSeq2SeqConfig(
        decoder_start_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=False,
        **(OPTIONS | {"eos_token_id": None}),
    )
    model = MahaForSeq2SeqLM(config).cuda().double().eval()
    inputs = batch()
    cached, whole = (
        model.generate(**inputs, max_new_tokens=24, num_beams=beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, whole)
    assert len(cached.unique()) > 8
