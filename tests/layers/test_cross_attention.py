"""Cross-attention against the formula written out."""

import pytest
import torch

from maha_attn.layers.cross_attention import CrossAttention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_formula(masked, bias):
    torch.manual_seed(0)
    layer = CrossAttention(12, 3, bias=bias).double()
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    mask = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        mask[0, :3] = mask[1, 5:] = False

    def heads(x):
        return x.unflatten(-1, (3, 4)).transpose(1, 2)

    q, k, v = heads(layer.q_proj(x)), heads(layer.k_proj(memory)), heads(layer.v_proj(memory))
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    expected = layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    actual = layer(x, *layer.project(memory), mask if masked else None)
    torch.testing.assert_close(actual, expected)
