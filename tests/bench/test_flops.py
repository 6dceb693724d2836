"""Counted cost: the closed form against brute force, and the limits that the design promises."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maha_attn import AttentionSpec, MultiscaleAttention
from maha_attn.bench.flops import attention_cost, visible_pairs


def brute_force(spec, length):
    """Pair by pair from the definition (formulation §2)."""
    pairs, keys = 0, length
    for s, span in enumerate(spec.spans):
        stride = spec.strides[s] if spec.queries == "fine" else 1
        queries = length if spec.queries == "fine" else keys
        for i, j in itertools.product(range(queries), range(keys)):
            if spec.causal:
                distance = (i + 1) // stride - 1 - j
                pairs += distance >= 0 and (span is None or distance < span)
            else:
                pairs += span is None or abs(i // stride - j) <= span / 2
        keys = keys // spec.ratio if spec.causal else -(-keys // spec.ratio)
    return pairs


@pytest.mark.parametrize("length", [1, 2, 9, 40, 67])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", ["coarse", "fine"])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_closed_form(preset, queries, causal, length):
    spec = AttentionSpec(
        hidden_size=8,
        num_heads=1,
        num_scales=3,
        window=7,
        preset=preset,
        queries=queries,
        causal=causal,
    )
    assert visible_pairs(spec, length) == brute_force(spec, length)


@pytest.mark.parametrize("causal", [True, False])
def test_the_default_saves_81_percent_at_4096_tokens(causal):
    spec = AttentionSpec(hidden_size=256, num_heads=4, causal=causal)
    cost = attention_cost(spec, 4096)
    assert cost.attention_flops <= 0.19 * cost.full_attention_flops
    assert cost.executed_pairs <= 2.2 * cost.visible_pairs
    if causal:
        assert cost.visible_pairs <= 0.125 * cost.full_visible_pairs


def test_the_papers_own_equation_saves_nothing():
    spec = AttentionSpec(hidden_size=256, num_heads=4, preset="paper")
    cost = attention_cost(spec, 4096)
    assert 1.3 < cost.visible_pairs / cost.full_visible_pairs < 1.35


def test_the_cpu_runs_what_was_counted():
    spec = AttentionSpec(hidden_size=32, num_heads=2, window=32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MultiscaleAttention(spec)(torch.randn(1, 1000, 32))
    assert counter.get_total_flops() == attention_cost(spec, 1000).layer_flops
