"""Cached decoding: logits and generated text equal those of full passes without a cache."""

import copy
from itertools import pairwise

import pytest
import torch

from maha_attn.models import MahaCache

VARIANTS = [
    {},
    {"layer_types": ["sliding", "full"]},
    {"layer_types": ["maha", "sliding"], "queries": "fine", "fusion": "nash"},
    {"ratio": 3, "preset": "paper", "fusion": "gate", "gating": True, "dilation": 2},
]
NARROW = 0.2  # Wider weights amplify rounding beyond 1e-5.
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
SAMPLE = {"do_sample": True, "num_return_sequences": 2}


def generate(model, ids, mask=None, new=8, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_logits_after_every_prompt_equal_the_full_pass(tiny, options, side):
    model = tiny.lm(initializer_range=NARROW, **options)
    rows = [tiny.tokens(n, seed=n) for n in ((21, 13) if side != "none" else (21, 21))]
    ids, mask = tiny.pad(rows, "left" if side == "none" else side)
    full = model(ids, attention_mask=mask).logits
    chunkings = [[0, n, *range(n + 1, min(n + 4, 21)), 21] for n in range(1, 21)]
    for bounds in ([*range(22)], *chunkings):
        cache, logits = MahaCache(model.config), []
        for start, end in pairwise(bounds):
            chunk = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            assert chunk.past_key_values is cache
            assert cache.get_seq_length() == end
            logits.append(chunk.logits)
        actual = torch.cat(logits, 1)[mask.bool()]
        torch.testing.assert_close(actual, full[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("mode", [{}, BEAMS, SAMPLE], ids=["greedy", "beams", "sample"])
def test_generated_text_is_the_same_without_a_cache(tiny, options, mode):
    model = tiny.lm(**options)
    ids, mask = tiny.pad([tiny.tokens(n, seed=n) for n in (3, 11, 6)], "left")
    cached = generate(model, ids, mask, **mode)
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **mode))
    assert len(cached[:, ids.shape[1] :].unique()) > 8, "the model repeats itself: a vacuous test"


@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_prompts_of_every_length(tiny, mode):
    model = tiny.lm()
    for length in range(1, 21):
        ids = tiny.tokens(2, length, seed=length)
        cached = generate(model, ids, new=5, **mode)
        assert torch.equal(cached, generate(model, ids, new=5, use_cache=False, **mode)), length


def test_left_padded_rows_generate_as_they_do_alone(tiny):
    model = tiny.lm()
    rows = [tiny.tokens(n, seed=n) for n in (3, 11, 6)]
    ids, mask = tiny.pad(rows, "left")
    batch = generate(model, ids, mask)
    for row, output in zip(rows, batch, strict=True):
        assert torch.equal(output[-8:], generate(model, row[None])[0, -8:])


def test_beams_notice_a_cache_that_is_not_reordered(tiny, monkeypatch):
    model, ids = tiny.lm(), tiny.tokens(2, 9)
    correct = generate(model, ids, new=12, **BEAMS)
    monkeypatch.setattr(MahaCache, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(correct, generate(model, ids, new=12, **BEAMS))


@pytest.mark.parametrize("pass_everything", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
def test_generation_continues_from_a_returned_cache(tiny, options, pass_everything):
    model = tiny.lm(**options)
    ids, mask = tiny.pad([tiny.tokens(n, seed=n) for n in (3, 11)], "left")
    first = generate(model, ids, mask, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, MahaCache)
    seen = cache.get_seq_length()
    assert seen == first.sequences.shape[1] - 1

    whole = torch.cat((first.sequences, tiny.tokens(2, 5, seed=9)), 1)
    whole_mask = torch.cat((mask, mask.new_ones(2, whole.shape[1] - mask.shape[1])), 1)
    expected = generate(model, whole, whole_mask, use_cache=False)[:, -8:]
    new = whole if pass_everything else whole[:, seen:]
    assert torch.equal(generate(model, new, whole_mask, past_key_values=cache)[:, -8:], expected)


def test_prompt_embeddings(tiny):
    model, ids = tiny.lm(), tiny.tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(output, generate(model, ids)[:, -8:])


def test_chunked_prefill(tiny):
    model, ids = tiny.lm(), tiny.tokens(2, 19)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))


def test_fusion_weights_of_a_step_are_those_of_the_full_pass(tiny):
    model, ids = tiny.lm(), tiny.tokens(1, 9)
    weights = model(ids, output_fusion_weights=True).fusion_weights
    cache = MahaCache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    last = model(ids[:, -1:], past_key_values=cache, output_fusion_weights=True).fusion_weights
    for full, step in zip(weights, last, strict=True):
        torch.testing.assert_close(step, full[:, :, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_rows_repeat_select_and_reset(tiny):
    model = tiny.lm(initializer_range=NARROW)
    ids, mask = tiny.pad([tiny.tokens(n, seed=n) for n in (4, 9, 6)], "left")
    cache, next_ids = MahaCache(model.config), tiny.tokens(3, 3, seed=5)
    assert (cache.batch_size, cache.is_initialized, cache.get_seq_length()) == (-1, False, 0)
    model(ids, attention_mask=mask, past_key_values=cache)
    assert (cache.batch_size, cache.is_initialized, cache.get_seq_length()) == (3, True, 9)
    assert cache.nbytes > 0
    assert not cache.is_compileable
    expected = model(next_ids, past_key_values=copy.deepcopy(cache)).logits

    def check(changed: MahaCache, rows: list[int]) -> None:
        assert changed.batch_size == len(rows)
        logits = model(next_ids[rows], past_key_values=changed).logits
        torch.testing.assert_close(logits, expected[rows], rtol=1e-5, atol=1e-5)

    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        check(changed, rows)
    cache.reset()
    assert (cache.batch_size, cache.is_initialized, cache.nbytes) == (-1, False, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful"),
        ({"cache_implementation": "static"}, "cache_implementation must be None"),
        ({"past_key_values": ((),)}, "Passing a tuple of `past_key_values` is not supported"),
    ],
)
def test_what_the_cache_cannot_do_is_refused(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.lm(), tiny.tokens(1, 5), **kwargs)


def test_assistant_use_and_cropping_are_refused(tiny):
    model = tiny.lm()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, tiny.tokens(1, 5), assistant_model=tiny.lm())
    with pytest.raises(ValueError, match="cannot give up tokens"):
        MahaCache(model.config).crop(-1)
    cache = MahaCache(model.config)
    with pytest.raises(ValueError, match="use_cache must be True"):
        generate(model, tiny.tokens(1, 5), past_key_values=cache, use_cache=False)


def test_a_cache_of_another_model_is_refused(tiny):
    cache = MahaCache(tiny.config(window=8))
    with pytest.raises(ValueError, match="cache belongs to another layer"):
        tiny.lm()(tiny.tokens(1, 5), past_key_values=cache)
