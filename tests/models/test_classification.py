"""Sequence classification: what is pooled, padding, the three kinds of loss, learning."""

import pytest
import torch
import torch.nn.functional as F

from maha_attn.models import MahaForCausalLM, MahaForMaskedLM, MahaForSequenceClassification
from maha_attn.models.classification import pool

NARROW = 0.2  # Wider weights amplify rounding beyond 1e-5.
POOLINGS = [(False, "mean"), (False, "first"), (False, "last"), (True, "mean"), (True, "last")]


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [4.0, 0.0, 2.5]), ("first", [3, 0, 1]), ("last", [5, 0, 4])]
)
def test_pooling_takes_real_tokens_alone(pooling, expected):
    states = torch.tensor([[9.0, 3, 9, 5], [9, 9, 9, 9], [1, 2, 3, 4]])[..., None]
    states[0, 0] = states[1] = torch.nan
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pool(states, mask, pooling)[:, 0], torch.tensor(expected))
    assert torch.equal(pool(states[2:], None, pooling)[:, 0], torch.tensor(expected[2:]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("causal", "pooling"), POOLINGS)
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(tiny, causal, pooling, side):
    model = tiny.classifier(causal=causal, classifier_pooling=pooling, initializer_range=NARROW)
    rows = [tiny.tokens(n, seed=n) for n in (1, 7, 8, 19)]
    ids, mask = tiny.pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, model(ids).logits, atol=1e-3), "the mask changes nothing"


@torch.no_grad()
def test_the_default_pooling_is_last_if_causal_else_mean(tiny):
    ids = tiny.tokens(2, 9)
    for causal, pooling in ((True, "last"), (False, "mean")):
        default, chosen = (
            tiny.classifier(causal=causal, classifier_pooling=p)(ids).logits
            for p in (None, pooling)
        )
        assert torch.equal(default, chosen)


def test_the_first_token_of_a_causal_model_is_refused(tiny):
    with pytest.raises(ValueError, match="classifier_pooling must be 'last' or 'mean'"):
        tiny.classifier(causal=True, classifier_pooling="first")


def test_an_all_padded_row_is_finite_and_harmless(tiny):
    model, ids = tiny.classifier(causal=False, initializer_range=NARROW), tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1] = 0
    output = model(ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    assert torch.equal(output.logits[1], torch.zeros(2))
    torch.testing.assert_close(output.logits[:1], model(ids[:1]).logits, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


LABELS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1, 1]), F.cross_entropy),
    "multi_label_classification": (
        3,
        torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]),
        F.binary_cross_entropy_with_logits,
    ),
    "regression": (1, torch.tensor([0.5, -1, 2, 0]), lambda x, y: F.mse_loss(x[:, 0], y)),
}


@pytest.mark.parametrize("problem", LABELS)
def test_loss_is_divided_by_num_items_in_batch(tiny, problem):
    num_labels, labels, expected = LABELS[problem]
    model, ids = tiny.classifier(num_labels=num_labels), tiny.tokens(4, 9)
    output = model(ids, labels=labels)
    assert model.config.problem_type == problem
    torch.testing.assert_close(output.loss, expected(output.logits, labels))
    parts = [
        model(
            ids[i : i + 1],
            labels=labels[i : i + 1],
            num_items_in_batch=torch.tensor(labels.numel()),
        ).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), output.loss)


@pytest.mark.parametrize("pretrained", [MahaForCausalLM, MahaForMaskedLM])
def test_a_pretrained_backbone_keeps_its_direction(tiny, tmp_path, pretrained):
    model = pretrained(tiny.config()).eval()
    model.save_pretrained(tmp_path)
    loaded = MahaForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert loaded.config.causal is (pretrained is MahaForCausalLM)
    ids = tiny.tokens(1, 9)
    assert loaded(ids).logits.shape == (1, 5)
    assert torch.equal(loaded.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_outputs_on_request(tiny):
    model, ids = tiny.classifier(num_labels=4), tiny.tokens(2, 9)
    assert set(model(ids)) == {"logits"}
    output = model(ids, output_fusion_weights=True, output_hidden_states=True)
    assert [w.shape for w in output.fusion_weights] == [(2, 2, 9, 3)] * 2
    assert [h.shape for h in output.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("causal", [True, False])
def test_learns_a_batch_by_heart(tiny, learn, causal):
    model = tiny.classifier(causal=causal, initializer_range=0.1)
    ids = tiny.tokens(16, 12) % 50 + 10
    labels = torch.arange(16) % 2
    learn(model, input_ids=ids, labels=labels)
    assert torch.equal(model(ids).logits.argmax(-1), labels)
