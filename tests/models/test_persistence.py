"""Saving and loading: the same bits back, and right values where some are missing."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from maha_attn.models import MahaForCausalLM, MahaForMaskedLM, MahaModel, MahaSeq2SeqModel

AUTO = {
    "lm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def shake(model):
    """Move every parameter, also those that start at a constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def assert_same_parameters(actual, expected):
    actual, expected = dict(actual), dict(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("kind", AUTO)
def test_roundtrip_is_bitwise(tiny, tmp_path, kind, auto, tied):
    model = shake(
        getattr(tiny, kind)(tie_word_embeddings=tied, fusion="convex", gating=True, dilation=2)
    )
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = (AUTO[kind] if auto else type(model)).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_json_string() == model.config.to_json_string()
    assert_same_parameters(loaded.named_parameters(), model.named_parameters())
    ids = tiny.tokens(2, 13)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "seq2seq" else {})
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    if loaded.get_output_embeddings() is not None:
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_encoder_and_decoder_load_without_their_head(tiny, tmp_path):
    model = shake(tiny.seq2seq(num_decoder_layers=1))
    model.save_pretrained(tmp_path)
    halves = AutoModel.from_pretrained(tmp_path)
    assert type(halves) is MahaSeq2SeqModel
    assert_same_parameters(halves.named_parameters(), model.model.named_parameters())


def test_a_backbone_travels_between_classes(tiny, tmp_path):
    lm = shake(tiny.lm())
    lm.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is MahaModel
    assert backbone.config.causal is True
    masked = MahaForMaskedLM.from_pretrained(tmp_path)
    assert masked.config.causal is False
    assert_same_parameters(backbone.named_parameters(), lm.model.named_parameters())
    assert_same_parameters(masked.named_parameters(), lm.named_parameters())
    ids = tiny.tokens(1, 9)
    assert torch.equal(backbone(ids).last_hidden_state, lm.model(ids).last_hidden_state)

    masked.save_pretrained(tmp_path / "masked")
    assert AutoModel.from_pretrained(tmp_path / "masked").config.causal is False
    again = MahaForCausalLM.from_pretrained(tmp_path / "masked")
    assert again.generation_config.temperature is None
    assert torch.equal(again(ids).logits, lm(ids).logits)


@pytest.mark.parametrize(
    "missing",
    [
        "pyramid.down.0",
        "fusion.logits",
        "fusion.gate_proj.weight",
        "fusion.log_gram",
        "pyramid.dilated.1",
        "attention_norm.weight",
    ],
)
def test_missing_values_start_as_in_a_new_model_and_others_stay(tiny, tmp_path, missing):
    options = {"dilation": 1}
    model, new = shake(tiny.lm(**options)), tiny.lm(**options)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    removed = [name for name in weights if name.endswith(missing)]
    assert len(removed) == 2
    save_file({k: v for k, v in weights.items() if k not in removed}, file, {"format": "pt"})

    loaded = dict(MahaForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, value in model.named_parameters():
        expected = new.get_parameter(name) if name in removed else value
        assert torch.equal(loaded[name], expected), name


def test_loading_straight_to_bfloat16_and_by_device_map(tiny, tmp_path):
    model = shake(tiny.lm())
    model.save_pretrained(tmp_path)
    for device_map in (None, "cpu"):
        loaded = MahaForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, device_map=device_map
        )
        expected = {name: p.bfloat16() for name, p in model.named_parameters()}
        assert_same_parameters(loaded.named_parameters(), expected)


def test_a_model_made_on_the_meta_device_can_be_filled(tiny):
    model = shake(tiny.lm())
    with torch.device("meta"):
        empty = MahaForCausalLM(model.config)
    assert all(p.is_meta for p in empty.parameters())
    assert not list(empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = tiny.tokens(2, 13)
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)
