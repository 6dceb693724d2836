"""Question answering: padding, loss, learning."""

import pytest
import torch
import torch.nn.functional as F

NARROW = 0.2  # Wider weights amplify rounding beyond 1e-5.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(tiny, causal, side):
    model = tiny.qa(causal=causal, initializer_range=NARROW)
    lengths = (2, 7, 8, 19)
    rows = [tiny.tokens(n, seed=n) for n in lengths]
    ids, mask = tiny.pad(rows, side)
    offsets = torch.tensor([19 - n if side == "left" else 0 for n in lengths])
    starts, ends = torch.tensor([0, 3, 2, 10]), torch.tensor([1, 5, 2, 18])

    def losses(start_logits, end_logits, starts, ends):
        cross_entropy = F.cross_entropy(start_logits, starts) + F.cross_entropy(end_logits, ends)
        return cross_entropy / 2

    output = model(
        ids, attention_mask=mask, start_positions=starts + offsets, end_positions=ends + offsets
    )
    alone = [
        model(row[None], start_positions=start[None], end_positions=end[None])
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]
    for i, (single, real) in enumerate(zip(alone, mask.bool(), strict=True)):
        for name in ("start_logits", "end_logits"):
            padded = output[name][i]
            torch.testing.assert_close(padded[real], single[name][0], rtol=1e-5, atol=1e-5)
            assert (padded.softmax(-1)[~real] == 0).all()
    loss = torch.stack([single.loss for single in alone]).mean()
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    direct = losses(output.start_logits, output.end_logits, starts + offsets, ends + offsets)
    torch.testing.assert_close(output.loss, direct)


def test_an_all_padded_row_is_finite(tiny):
    model, ids = tiny.qa(causal=False, initializer_range=NARROW), tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1] = 0
    positions = torch.tensor([3, 0])
    output = model(ids, attention_mask=mask, start_positions=positions, end_positions=positions)
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_loss_is_divided_by_num_items_in_batch(tiny):
    model, ids = tiny.qa(causal=False), tiny.tokens(4, 9)
    starts, ends = torch.tensor([0, 3, 9, 2]), torch.tensor([1, 3, 9, 8])  # 9: beyond the row.
    whole = model(ids, start_positions=starts, end_positions=ends).loss
    parts = [
        model(
            ids[i : i + 1],
            start_positions=starts[i : i + 1],
            end_positions=ends[i : i + 1],
            num_items_in_batch=torch.tensor(3),
        ).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_outputs_on_request(tiny):
    model, ids = tiny.qa(), tiny.tokens(2, 9)
    assert set(model(ids)) == {"start_logits", "end_logits"}
    output = model(ids, output_fusion_weights=True, output_hidden_states=True)
    assert [w.shape for w in output.fusion_weights] == [(2, 2, 9, 3)] * 2
    assert [h.shape for h in output.hidden_states] == [(2, 9, 32)] * 3


def test_learns_a_batch_by_heart(tiny, learn):
    model = tiny.qa(causal=False, initializer_range=0.1)
    ids = tiny.tokens(16, 16) % 40 + 20
    starts, ends = torch.arange(16) % 6 + 2, torch.arange(16) % 5 + 9
    learn(model, input_ids=ids, start_positions=starts, end_positions=ends)
    output = model(ids)
    assert torch.equal(output.start_logits.argmax(-1), starts)
    assert torch.equal(output.end_logits.argmax(-1), ends)
