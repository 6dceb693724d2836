"""The models: causality, padding, outputs, loss, initial values and errors."""

import pytest
import torch

from maha_attn.layers.fusion import ScaleFusion
from maha_attn.layers.pyramid import ScalePyramid
from maha_attn.models import MahaForCausalLM, MahaForMaskedLM, MahaModel

MIXTURES = [None, ["maha", "full"], ["sliding", "maha"], ["full", "sliding"]]
OPTIONS = [
    {},
    {"queries": "fine", "gating": True, "dilation": 2},
    {"norm": "post", "downsample": "max", "fusion": "nash"},
]
NARROW = 0.2  # Wider weights amplify rounding beyond the tolerance (fp64 agrees to 1e-13).


@pytest.mark.parametrize("layer_types", MIXTURES)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_later_tokens_change_nothing_before_them(tiny, layer_types, options):
    model = tiny.lm(layer_types=layer_types, **options)
    ids, other = tiny.tokens(1, 25), tiny.tokens(1, 25, seed=1)
    logits = model(ids).logits
    for cut in range(1, 25):
        changed = model(torch.cat((ids[:, :cut], other[:, cut:]), 1)).logits
        assert torch.equal(logits[:, :cut], changed[:, :cut]), cut
        assert not torch.equal(logits[:, cut:], changed[:, cut:]), cut


@torch.no_grad()
def test_masked_lm_sees_both_sides_and_its_class_decides(tiny):
    model = tiny.mlm(causal=True)
    assert model.config.causal is model.model.config.causal is False
    ids, other = tiny.tokens(1, 25), tiny.tokens(1, 25, seed=1)
    changed = torch.cat((ids[:, :20], other[:, 20:]), 1)
    assert not torch.allclose(model(ids).logits[:, :20], model(changed).logits[:, :20])
    config = tiny.config(causal=False)
    assert MahaForCausalLM(config).config.causal is True
    assert config.causal is False


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer_types", MIXTURES[:3])
@pytest.mark.parametrize("kind", ["lm", "mlm"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(tiny, kind, layer_types, side):
    model = getattr(tiny, kind)(layer_types=layer_types, initializer_range=NARROW)
    rows = [tiny.tokens(n, seed=n) for n in (1, 7, 8, 19)]
    ids, mask = tiny.pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for row, padded, real in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(padded[real], model(row[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lm", "mlm"])
def test_an_all_padded_row_is_finite_and_harmless(tiny, kind):
    model = getattr(tiny, kind)(initializer_range=NARROW)
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1] = 0
    output = model(ids, attention_mask=mask, labels=ids)
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.logits[:1], model(ids[:1]).logits, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_embeddings_stand_in_for_ids(tiny):
    model, ids = tiny.lm(), tiny.tokens(2, 9)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, model(ids).logits)


@torch.no_grad()
def test_outputs_on_request(tiny):
    model = tiny.lm(layer_types=["maha", "sliding"])
    ids = tiny.tokens(2, 9)
    plain = model(ids)
    assert plain.fusion_weights is plain.hidden_states is None
    output = model(ids, output_fusion_weights=True, output_hidden_states=True)
    assert [w.shape for w in output.fusion_weights] == [(2, 2, 9, 3), (2, 2, 9, 1)]
    torch.testing.assert_close(output.fusion_weights[0].sum(-1), torch.ones(2, 2, 9))
    assert [h.shape for h in output.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, plain.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], plain.logits)


@pytest.mark.parametrize("kind", ["lm", "mlm"])
def test_loss_is_divided_by_num_items_in_batch(tiny, kind):
    model, ids = getattr(tiny, kind)(), tiny.tokens(4, 9)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    counted = labels[:, 1:] if kind == "lm" else labels
    count = (counted != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    logits = model(ids).logits[:, :-1] if kind == "lm" else model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), counted.flatten())
    torch.testing.assert_close(whole, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny, reentrant):
    ids = tiny.tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny.lm().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["lm", "mlm"])
def test_bfloat16(tiny, kind):
    model = getattr(tiny, kind)(initializer_range=0.1)
    ids = tiny.tokens(2, 33)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).logits.float(), exact, rtol=0.1, atol=0.1)
    output = model.bfloat16()(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), exact, rtol=0.1, atol=0.1)
    output.loss.backward()


def test_compiles_in_one_graph(tiny):
    model, ids = tiny.lm().train(), tiny.tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = compiled(ids, attention_mask=mask, labels=ids)
    # Not bit for bit: eager heads are paired, compiled ones are not.
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)


def test_initial_values(tiny):
    model = tiny.lm(initializer_range=0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            assert (module.weight == 1).all()
        elif isinstance(module, ScalePyramid):
            mean = torch.tensor([0, 0.5, 0.5])[:, None].expand(3, 32)
            assert all(torch.equal(weight, mean) for weight in module.down)
        elif isinstance(module, ScaleFusion):
            start = dict(module.named_parameters())
            assert torch.equal(start.pop("logits"), torch.tensor([3.0, 0, 0]).expand(2, 3))
            assert start.keys() == {"gate_proj.weight", "log_gram"}
            assert not any(value.any() for value in start.values())
    for projection in (model.lm_head, model.model.layers[0].attention.v_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_embeddings_are_tied_by_default(tiny):
    model = tiny.lm(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 32)}, ValueError, "exactly one"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"N at least 1, got \[2, 0\]"),
        ({"input_ids": IDS[0]}, ValueError, r"shape \[B, N\].* got \[5\]"),
        ({"input_ids": IDS.float()}, TypeError, "integer token ids, got torch.float32"),
        ({"inputs_embeds": torch.ones(2, 5, 31)}, ValueError, r"\[B, N, 32\] .* got \[2, 5, 31\]"),
        ({"inputs_embeds": torch.ones(2, 0, 32)}, ValueError, r"N at least 1, got \[2, 0, 32\]"),
        ({"inputs_embeds": torch.ones(2, 5, 32).long()}, TypeError, "floating point, got"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, ValueError, r"\[2, 5\].* got \[2, 4\]"),
        ({"input_ids": IDS, "attention_mask": IDS[:, None, None]}, ValueError, "must have"),
        ({"input_ids": IDS, "output_attentions": True}, ValueError, "output_fusion_weights=True"),
        ({"input_ids": IDS, "position_ids": IDS}, ValueError, "position_ids is not supported"),
        ({"input_ids": IDS, "past_key_values": ((),)}, TypeError, "must be a MahaCache, got tuple"),
    ],
)
def test_bad_input_gives_one_clear_error(tiny, inputs, error, message):
    with pytest.raises(error, match=message):
        tiny.lm()(**inputs)


def test_a_bidirectional_model_has_no_cache(tiny):
    model = MahaModel(tiny.config(causal=False))
    assert model(IDS).past_key_values is None
    with pytest.raises(ValueError, match="use_cache needs a causal model"):
        model(IDS, use_cache=True)


def test_sequence_granularity_is_for_bidirectional_models(tiny):
    config = tiny.config(causal=False, granularity="sequence")
    assert MahaForMaskedLM(config)(IDS).logits.isfinite().all()
    with pytest.raises(ValueError, match="granularity='sequence' needs causal=False"):
        MahaForCausalLM(config)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_cache_and_gradient_checkpointing_exclude_each_other(tiny):
    model = tiny.lm().train()
    assert model(IDS).past_key_values is None
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache must be False"):
        model(IDS, use_cache=True)
    assert model.eval()(IDS, use_cache=True).past_key_values.get_seq_length() == 5
