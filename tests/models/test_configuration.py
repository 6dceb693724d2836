"""MahaConfig: AttentionSpec's options, one file in and out, errors at once."""

import dataclasses
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from maha_attn import AttentionSpec
from maha_attn.models import MahaConfig, MahaSeq2SeqConfig

OPTIONS = [
    f for f in dataclasses.fields(AttentionSpec) if f.name not in ("hidden_size", "num_heads")
]


def test_options_and_defaults_are_attention_specs():
    config = MahaConfig()
    for option in OPTIONS:
        assert getattr(config, option.name) == option.default, option.name


def test_num_heads_is_num_attention_heads():
    config = MahaConfig(hidden_size=64, num_heads=8)
    assert config.num_attention_heads == config.num_heads == config.attention_spec(0).num_heads == 8


def test_layer_types_choose_the_attention(tiny):
    config = tiny.config(num_hidden_layers=3, layer_types=["maha", "full", "sliding"], window=16)
    maha, full, sliding = (config.attention_spec(i) for i in range(3))
    assert (maha.num_scales, maha.preset) == (3, "linear")
    assert full.spans == (None,)
    assert sliding.spans == (16,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"fusion": "vote"}, "fusion must be one of .* got 'vote'"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size must be a multiple of num_heads"),
        ({"granularity": "sequence"}, "granularity='sequence' needs causal=False"),
        ({"sparsity": 1.0}, "sparsity must be 0 when constraint='simplex'"),
        ({"layer_types": ["maha", "mamba"]}, "layer_types must hold one of maha, full, sliding"),
        ({"layer_types": ["maha"]}, "each of the 2 layers"),
        ({"fushion": "nash"}, "unknown option 'fushion'; did you mean 'fusion'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"classifier_pooling": "max"}, "expected one of .*'mean', 'first', 'last'.* got max"),
    ],
)
def test_bad_options_are_refused_at_once(tiny, options, message):
    for make in (tiny.config, tiny.seq2seq_config):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            make(**options)


def test_bad_options_of_a_decoder_say_so(tiny):
    for options in ({"num_decoder_layers": 0}, {"decoder_layer_types": ["full"]}):
        with pytest.raises(ValueError, match=r"in the decoder \(num_decoder_layers, "):
            tiny.seq2seq_config(**options)


def test_both_halves_have_the_options_of_the_whole(tiny, tmp_path):
    options = {"fusion": "nash", "temperature": 0.25, "layer_types": ["sliding", "maha"]}
    tiny.seq2seq_config(
        num_decoder_layers=3, decoder_layer_types=["maha", "full", "sliding"], **options
    ).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MahaSeq2SeqConfig
    encoder, decoder = config.encoder_config(), config.decoder_config()
    assert (encoder.causal, encoder.num_hidden_layers) == (False, 2)
    assert (decoder.causal, decoder.num_hidden_layers) == (True, 3)
    assert encoder.layer_types == ["sliding", "maha"]
    assert decoder.layer_types == ["maha", "full", "sliding"]
    for half in (encoder, decoder):
        assert type(half) is MahaConfig
        assert half.is_encoder_decoder is False
        assert (half.fusion, half.temperature, half.vocab_size) == ("nash", 0.25, 61)
    assert tiny.seq2seq_config().decoder_config().num_hidden_layers == 2


def test_roundtrip_through_json(tiny, tmp_path):
    config = tiny.config(
        layer_types=["sliding", "maha"], fusion="nash", kernel_size=5, temperature=0.25, norm="post"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MahaConfig)
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
    assert MahaConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert [loaded.attention_spec(i) for i in range(2)] == [
        config.attention_spec(i) for i in range(2)
    ]


def test_fusion_temperature_is_no_sampling_temperature(tiny, tmp_path):
    config = tiny.config(temperature=0.0)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_model_config(config).temperature is None
    assert "temperature" not in json.loads((tmp_path / "config.json").read_text())
    assert MahaConfig.from_pretrained(tmp_path).temperature == 0.0
    assert tiny.lm(temperature=0.0).generation_config.temperature is None


def test_layer_types_survive_readers_that_do_not_know_the_model(tiny, tmp_path):
    tiny.config(layer_types=["maha", "sliding"]).save_pretrained(tmp_path)
    PreTrainedConfig.from_json_file(tmp_path / "config.json")  # As the Trainer does on resuming.
    assert MahaConfig.from_pretrained(tmp_path).layer_types == ["maha", "sliding"]
