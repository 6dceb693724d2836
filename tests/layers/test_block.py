"""The block: residuals and norms around the attention, and the cache through it."""

import pytest
import torch

from maha_attn import AttentionCache, AttentionSpec, MahaBlock

SPEC = AttentionSpec(hidden_size=16, num_heads=2, num_scales=3, window=5)


def test_pre_and_post_norm():
    x = torch.randn(2, 20, 16)
    block = MahaBlock(SPEC, intermediate_size=24)
    mid = x + block.attention(block.attention_norm(x))
    expected = mid + block.feed_forward(block.feed_forward_norm(mid))
    torch.testing.assert_close(block(x), expected)
    block = MahaBlock(SPEC, intermediate_size=24, norm="post")
    mid = block.attention_norm(x + block.attention(x))
    expected = block.feed_forward_norm(mid + block.feed_forward(mid))
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_cache_and_info_pass_through():
    block, x = MahaBlock(SPEC, intermediate_size=24), torch.randn(2, 20, 16)
    cache = AttentionCache(SPEC)
    y = torch.cat((block(x[:, :9], cache=cache), block(x[:, 9:], cache=cache)), 1)
    whole, info = block(x, return_info=True)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-5)
    assert info.weights.shape == (2, 2, 20, 3)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="norm must be 'pre' or 'post', got 'mid'"):
        MahaBlock(SPEC, intermediate_size=24, norm="mid")
    with pytest.raises(ValueError, match="intermediate_size must be at least 1, got 0"):
        MahaBlock(SPEC, intermediate_size=0)
