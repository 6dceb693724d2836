"""Baselines in the models: equal sizes, saved, loaded and trained, no cache where there is none."""

import pytest
import torch

from maha_attn.baselines import ATTENTIONS
from maha_attn.models import MahaConfig, MahaForCausalLM, MahaForMaskedLM
from maha_attn.models.parameters import count_parameters, matched_intermediate_size

NAMES = [name for name, attention in ATTENTIONS.items() if not attention.needs_gpu]


def config(name: str, **options) -> MahaConfig:
    defaults = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window": 8,
        "max_position_embeddings": 32,
        "layer_types": [name] * 2,
    }
    return MahaConfig(**(defaults | options))


def model_class(name: str):
    return MahaForCausalLM if ATTENTIONS[name].causal else MahaForMaskedLM


@pytest.mark.parametrize("name", NAMES)
def test_equal_in_size(name):
    """Within 2 % of MAHA by the width of the feed-forward."""
    kind = model_class(name)
    reference = count_parameters(config("maha"), kind)
    width = matched_intermediate_size(config(name), reference, kind, within=0.02)
    assert width % 8 == 0
    made = kind(config(name, intermediate_size=width)).num_parameters()
    assert abs(made - reference) <= 0.02 * reference
    assert made == count_parameters(config(name, intermediate_size=width), kind)


def test_a_model_too_large_for_its_reference_is_refused():
    with pytest.raises(
        ValueError,
        match=r"no feed-forward's width gives 1,000 parameters within 2%: the closest, 8, gives",
    ):
        matched_intermediate_size(config("mamba2"), 1000, within=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_and_trained(name, tmp_path):
    kind = model_class(name)
    torch.manual_seed(0)
    model = kind(config(name)).eval()
    ids = torch.randint(1, 61, (2, 30))
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    outputs = []
    for one in (model, loaded):
        torch.manual_seed(1)
        outputs.append(one(ids).logits)
    assert torch.equal(*outputs)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=3e-3)
    losses = []
    for _ in range(16):
        loss = loaded.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [n for n in NAMES if ATTENTIONS[n].causal])
def test_a_causal_model_sees_no_later_token(name):
    torch.manual_seed(0)
    model = MahaForCausalLM(config(name, initializer_range=0.2)).eval()
    ids = torch.randint(1, 61, (1, 32))
    other = ids.clone()
    other[:, 17:] = (ids[:, 17:] + 1) % 61
    with torch.no_grad():
        a, b = (model(t).logits for t in (ids, other))
    torch.testing.assert_close(a[:, :17], b[:, :17], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[:, 17:], b[:, 17:])


def test_a_causal_model_of_a_bidirectional_attention_is_refused():
    with pytest.raises(ValueError, match="longformer has no causal form"):
        MahaForCausalLM(config("longformer"))


def test_generation_without_a_cache():
    torch.manual_seed(0)
    model = MahaForCausalLM(config("mamba2", layer_types=["mamba2", "maha"])).eval()
    ids = torch.randint(1, 61, (1, 5))
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="use_cache must be False: mamba2"):
        model.generate(ids, max_new_tokens=3)
    text = model.generate(ids, max_new_tokens=3, use_cache=False, do_sample=False)
    assert text.shape == (1, 8)
