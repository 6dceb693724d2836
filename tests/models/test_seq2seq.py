"""Encoder and decoder: who sees what, padding, caches, generation, loss, learning."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from maha_attn.models import MahaCache, MahaConfig, MahaForMaskedLM, MahaModel

NARROW = 0.2  # Wider weights amplify rounding beyond 1e-5.
VARIANTS = [
    {},
    {"num_decoder_layers": 1, "layer_types": ["full", "maha"], "decoder_layer_types": ["sliding"]},
    {"norm": "post", "queries": "fine", "gating": True, "dilation": 2, "bias": True},
]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sample": {"do_sample": True, "num_return_sequences": 2},
}


def generate(model, ids, new=8, **kwargs):
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=new, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_the_decoder_sees_all_of_the_other_text_and_none_of_its_own_future(tiny, options):
    model = tiny.seq2seq(**options)
    ids, target = tiny.tokens(1, 9), tiny.tokens(1, 17)
    other = target % 60 + 1  # Another token everywhere.
    logits = model(ids, decoder_input_ids=target).logits
    for cut in range(1, 17):
        changed = torch.cat((target[:, :cut], other[:, cut:]), 1)
        changed = model(ids, decoder_input_ids=changed).logits
        assert torch.equal(logits[:, :cut], changed[:, :cut]), cut
        assert not torch.equal(logits[:, cut:], changed[:, cut:]), cut
    for place in range(9):
        changed = ids.clone()
        changed[:, place] = changed[:, place] % 60 + 1
        changed = model(changed, decoder_input_ids=target).logits
        assert (logits != changed).any(-1).all(), place


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(tiny, options, side):
    model = tiny.seq2seq(initializer_range=NARROW, **options)
    sources = [tiny.tokens(n, seed=n) for n in (1, 7, 8, 19)]
    targets = [tiny.tokens(n, seed=9 * n) for n in (5, 11, 2, 8)]
    ids, mask = tiny.pad(sources, side)
    target, target_mask = tiny.pad(targets, side)
    logits = model(
        ids, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask
    ).logits
    for i, real in enumerate(target_mask.bool()):
        alone = model(sources[i][None], decoder_input_ids=targets[i][None]).logits[0]
        torch.testing.assert_close(logits[i, real], alone, rtol=1e-5, atol=1e-5)
    unmasked = model(ids, decoder_input_ids=target, decoder_attention_mask=target_mask).logits
    assert not torch.allclose(logits, unmasked, atol=1e-3), "the encoder's mask changes nothing"


def test_padding_may_hold_anything_and_a_row_of_it_attends_to_zeros(tiny):
    model = tiny.seq2seq(initializer_range=NARROW)
    ids, target = tiny.tokens(3, 9), tiny.tokens(3, 6, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1] = 0
    states = model.get_encoder()(ids, attention_mask=mask).last_hidden_state.detach()
    clean, poisoned = (
        model(
            encoder_outputs=(states.masked_fill(mask[..., None] == 0, value),),
            attention_mask=mask,
            decoder_input_ids=target,
            labels=target,
        )
        for value in (0, torch.nan)
    )
    assert clean.logits.isfinite().all()
    assert torch.equal(clean.logits, poisoned.logits)
    poisoned.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_logits_after_every_prompt_equal_the_full_pass(tiny, options, side):
    model = tiny.seq2seq(initializer_range=NARROW, **options)
    ids, mask = tiny.pad([tiny.tokens(n, seed=n) for n in (5, 9)], side)
    target = tiny.tokens(2, 13, seed=1)
    full = model(ids, attention_mask=mask, decoder_input_ids=target).logits
    for bounds in (
        [*range(14)],
        *([0, n, *range(n + 1, min(n + 4, 13)), 13] for n in range(1, 13)),
    ):
        cache, logits = model.new_cache(), []
        encoded = model.get_encoder()(ids, attention_mask=mask)
        for start, end in pairwise(bounds):
            chunk = model(
                attention_mask=mask,
                encoder_outputs=encoded,
                decoder_input_ids=target[:, start:end],
                past_key_values=cache,
            )
            assert chunk.past_key_values is cache
            assert cache.get_seq_length() == end
            logits.append(chunk.logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS[:2])  # With norm="post" a random model repeats itself.
@pytest.mark.parametrize("mode", MODES)
def test_generated_text_is_the_same_without_a_cache(tiny, options, mode):
    model = tiny.seq2seq(**options)
    ids, mask = tiny.pad([tiny.tokens(n, seed=n) for n in (3, 11, 6)], "right")
    options = {"attention_mask": mask, **MODES[mode]}
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert len(cached[:, 1:].unique()) > 8, "the model repeats itself: a vacuous test"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_generate_as_they_do_alone(tiny, side):
    model = tiny.seq2seq()
    rows = [tiny.tokens(n, seed=n) for n in (3, 11, 6)]
    ids, mask = tiny.pad(rows, side)
    for row, output in zip(rows, generate(model, ids, attention_mask=mask), strict=True):
        assert torch.equal(output, generate(model, row[None])[0])


def test_beams_notice_a_cache_that_is_not_reordered(tiny, monkeypatch):
    model, ids = tiny.seq2seq(), tiny.tokens(2, 9)
    correct = generate(model, ids, new=12, **MODES["beams"])
    monkeypatch.setattr(MahaCache, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(correct, generate(model, ids, new=12, **MODES["beams"]))


def test_the_encoder_runs_once_and_its_output_can_be_reused(tiny, monkeypatch):
    model, ids = tiny.seq2seq(), tiny.tokens(2, 9)
    expected = generate(model, ids)
    encoded = model.get_encoder()(ids)
    prompt = torch.zeros(2, 1, dtype=torch.long)
    logits = model(ids, decoder_input_ids=prompt).logits
    calls = []
    monkeypatch.setattr(model.model.encoder, "forward", lambda **kwargs: calls.append(1))
    for given in (encoded, BaseModelOutput(encoded.last_hidden_state), (encoded[0],)):
        output = model(encoder_outputs=given, decoder_input_ids=prompt)
        assert torch.equal(output.logits, logits)
        assert torch.equal(output.encoder_last_hidden_state, encoded[0])
    assert torch.equal(generate(model, None, encoder_outputs=encoded), expected)
    assert not calls
    monkeypatch.undo()
    model.get_encoder().register_forward_hook(lambda *args: calls.append(1))
    generate(model, ids)
    assert len(calls) == 1


def test_generation_continues_from_a_returned_cache(tiny):
    model, ids = tiny.seq2seq(), tiny.tokens(2, 9)
    first = generate(model, ids, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, EncoderDecoderCache)
    expected = generate(model, ids, new=16)
    longer = generate(
        model,
        ids,
        decoder_input_ids=first.sequences,
        decoder_attention_mask=torch.ones_like(first.sequences),  # Says that all were passed again.
        past_key_values=first.past_key_values,
    )
    assert torch.equal(longer, expected)


@pytest.mark.parametrize("reuse", ["reset", "new"])
@torch.no_grad()
def test_a_reset_cache_takes_another_text(tiny, reuse):
    model, (first, second) = tiny.seq2seq(), (tiny.tokens(2, n, seed=n) for n in (9, 6))
    prompt, cache = tiny.tokens(2, 5), model.new_cache()
    model(first, decoder_input_ids=prompt, past_key_values=cache)
    if reuse == "reset":
        cache.reset()
    else:
        cache = model.new_cache()
    actual = model(second, decoder_input_ids=prompt, past_key_values=cache).logits
    assert torch.equal(actual, model(second, decoder_input_ids=prompt).logits)


def test_labels_are_read_shifted(tiny):
    model, ids = tiny.seq2seq(decoder_start_token_id=7), tiny.tokens(2, 9)
    labels = tiny.tokens(2, 5, seed=1)
    labels[1, 3:] = -100
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted[:, 0].tolist() == [7, 7]
    assert torch.equal(shifted[:, 1:], labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0))
    output = model(ids, labels=labels)
    logits = model(ids, decoder_input_ids=shifted).logits
    assert torch.equal(output.logits, logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model(ids, labels=labels, logits_to_keep=5).logits, logits)
    sliced = torch.cat((labels, labels), 1)[:, :5]
    assert torch.equal(model(ids, labels=sliced).loss, output.loss)


def test_loss_is_divided_by_num_items_in_batch(tiny):
    model, ids, labels = tiny.seq2seq(), tiny.tokens(4, 9), tiny.tokens(4, 6, seed=1)
    labels = labels.masked_fill(labels % 3 == 0, -100)
    count = (labels != -100).sum()
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny, reentrant):
    ids, labels = tiny.tokens(2, 17), tiny.tokens(2, 11, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def gradients(checkpointing):
        model = tiny.seq2seq().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, actual = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_bfloat16(tiny):
    model = tiny.seq2seq(initializer_range=0.1)
    ids, labels = tiny.tokens(2, 33), tiny.tokens(2, 9, seed=1)
    exact = model(ids, labels=labels).logits
    output = model.bfloat16()(ids, labels=labels)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), exact, rtol=0.1, atol=0.1)
    output.loss.backward()


def test_compiles_in_one_graph(tiny):
    model = tiny.seq2seq(num_hidden_layers=1, num_scales=2).train()
    ids, labels = tiny.tokens(2, 17), tiny.tokens(2, 9, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = compiled(ids, attention_mask=mask, labels=labels)
    # Not bit for bit: eager heads are paired, compiled ones are not.
    expected = model(ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)


def test_outputs_on_request(tiny):
    model, ids, target = tiny.seq2seq(num_decoder_layers=3), tiny.tokens(2, 9), tiny.tokens(2, 6)
    plain = model(ids, decoder_input_ids=target)
    assert set(plain) == {"logits", "past_key_values", "encoder_last_hidden_state"}
    output = model(
        ids, decoder_input_ids=target, output_fusion_weights=True, output_hidden_states=True
    )
    assert [w.shape for w in output.encoder_fusion_weights] == [(2, 2, 9, 3)] * 2
    assert [w.shape for w in output.decoder_fusion_weights] == [(2, 2, 6, 3)] * 3
    assert [h.shape for h in output.encoder_hidden_states] == [(2, 9, 32)] * 3
    assert [h.shape for h in output.decoder_hidden_states] == [(2, 6, 32)] * 4
    assert torch.equal(model.lm_head(output.decoder_hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, decoder_input_ids=target, return_dict=False)[0], output.logits)
    embedded = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        decoder_inputs_embeds=model.get_decoder().embed_tokens(target),
    )
    assert torch.equal(embedded.logits, output.logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_one_matrix_or_three(tiny, tied):
    model = tiny.seq2seq(tie_word_embeddings=tied)
    model.resize_token_embeddings(70, mean_resizing=False)
    encoder, decoder = model.get_encoder().embed_tokens, model.get_decoder().embed_tokens
    matrices = [encoder.weight, decoder.weight, model.lm_head.weight]
    assert [m.shape for m in matrices] == [(70, 32)] * 3
    assert len({m.data_ptr() for m in matrices}) == (1 if tied else 3)
    assert model(torch.tensor([[69]]), labels=torch.tensor([[69]])).loss.isfinite()


def test_the_encoder_can_start_from_a_masked_language_model(tiny, tmp_path):
    MahaForMaskedLM(tiny.config()).save_pretrained(tmp_path)
    model = tiny.seq2seq()
    assert type(model.get_encoder()) is MahaModel
    model.get_encoder().load_state_dict(MahaModel.from_pretrained(tmp_path).state_dict())
    model.get_encoder().save_pretrained(tmp_path / "encoder")
    encoder = MahaModel.from_pretrained(tmp_path / "encoder")
    assert type(encoder.config) is MahaConfig
    assert encoder.config.causal is False
    ids = tiny.tokens(1, 9)
    assert torch.equal(encoder(ids)[0], model.get_encoder()(ids)[0])


def test_learns_to_turn_a_text_around(tiny, learn):
    model = tiny.seq2seq(initializer_range=0.1, eos_token_id=1)
    ids = tiny.tokens(8, 7) % 50 + 5
    labels = torch.cat((ids.flip(1), torch.ones(8, 1, dtype=torch.long)), 1)
    learn(model, input_ids=ids, labels=labels)
    assert torch.equal(model.generate(ids, max_new_tokens=20)[:, 1:], labels)


IDS = torch.ones(2, 5, dtype=torch.long)
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
STATES = torch.ones(2, 5, 32)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"decoder_input_ids": IDS}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS}, ValueError, "exactly one of decoder_input_ids and decoder_inputs"),
        ({**BOTH, "decoder_inputs_embeds": STATES}, ValueError, "exactly one of decoder_input_ids"),
        ({**BOTH, "attention_mask": IDS[:, :4]}, ValueError, r"\[2, 5\].* got \[2, 4\]"),
        (
            {"encoder_outputs": (STATES,), "decoder_input_ids": IDS, "attention_mask": IDS[:, :4]},
            ValueError,
            r"attention_mask of the encoder must have shape \[2, 5\] .* got \[2, 4\]",
        ),
        ({**BOTH, "decoder_attention_mask": IDS[:1]}, ValueError, r"\[2, 5\].* got \[1, 5\]"),
        ({**BOTH, "past_key_values": DynamicCache()}, TypeError, "EncoderDecoderCache, got Dynam"),
        (
            {**BOTH, "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())},
            TypeError,
            "must be a MahaCache, got DynamicCache",
        ),
        ({**BOTH, "output_attentions": True}, ValueError, "output_fusion_weights=True"),
    ],
)
def test_bad_input_gives_one_clear_error(tiny, inputs, error, message):
    with pytest.raises(error, match=message):
        tiny.seq2seq()(**inputs)


@pytest.mark.parametrize("missing", ["decoder_start_token_id", "pad_token_id"])
def test_labels_need_special_tokens(tiny, missing):
    with pytest.raises(ValueError, match=f"{missing} of the configuration must be set"):
        tiny.seq2seq(**{missing: None})(IDS, labels=IDS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful"),
        ({"cache_implementation": "static"}, "cache_implementation must be None"),
    ],
)
def test_what_the_cache_cannot_do_is_refused(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.seq2seq(), IDS, **kwargs)
