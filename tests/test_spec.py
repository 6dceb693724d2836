"""AttentionSpec: defaults, derived values, and one clear error for every wrong option."""

import dataclasses

import pytest

from maha_attn import AttentionSpec


def test_defaults_are_the_documented_ones():
    spec = AttentionSpec(hidden_size=256, num_heads=4)
    same = AttentionSpec(
        hidden_size=256,
        num_heads=4,
        num_scales=4,
        ratio=2,
        window=128,
        preset="linear",
        downsample="conv",
        queries="coarse",
        fusion="convex",
        causal=True,
    )
    assert spec == same
    assert hash(spec) == hash(same)


def test_spec_is_frozen_and_keyword_only():
    spec = AttentionSpec(hidden_size=256, num_heads=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.window = 64  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        AttentionSpec(256, 4)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("preset", "num_scales", "spans"),
    [
        ("linear", 4, (128, 128, 128, None)),
        ("linear", 1, (None,)),
        ("paper", 3, (None, None, None)),
        ("window", 2, (128, 128)),
    ],
)
def test_spans(preset, num_scales, spans):
    spec = AttentionSpec(hidden_size=8, num_heads=1, preset=preset, num_scales=num_scales)
    assert spec.spans == spans


def test_strides_and_taps():
    spec = AttentionSpec(hidden_size=8, num_heads=1, ratio=3, num_scales=3)
    assert spec.strides == (1, 3, 9)
    assert spec.taps == 4
    assert dataclasses.replace(spec, kernel_size=5).taps == 5
    assert dataclasses.replace(spec, downsample="mean", kernel_size=5).taps == 3


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"hidden_size": 10}, ValueError, ["hidden_size", "num_heads", "10", "4"]),
        ({"hidden_size": 12}, ValueError, ["even", "3"]),
        ({"hidden_size": 0}, ValueError, ["hidden_size", "at least 1"]),
        ({"hidden_size": 256.0}, TypeError, ["hidden_size", "integer", "256.0"]),
        ({"num_heads": True}, TypeError, ["num_heads", "integer"]),
        ({"num_scales": 9}, ValueError, ["num_scales", "8", "9"]),
        ({"num_scales": 0}, ValueError, ["num_scales", "at least 1"]),
        ({"ratio": 1}, ValueError, ["ratio", "at least 2", "1"]),
        ({"window": 0}, ValueError, ["window", "at least 1", "0"]),
        ({"window": "128"}, TypeError, ["window", "integer", "'128'"]),
        ({"preset": "quadratic"}, ValueError, ["preset", "linear", "paper", "'quadratic'"]),
        ({"fusion": "sum"}, ValueError, ["fusion", "nash", "'sum'"]),
        ({"downsample": "avg"}, ValueError, ["downsample", "mean", "'avg'"]),
        ({"queries": None}, ValueError, ["queries", "coarse", "None"]),
        ({"kernel_size": 1}, ValueError, ["kernel_size", "ratio"]),
        ({"causal": 1}, TypeError, ["causal", "True or False", "1"]),
        ({"granularity": "sequence"}, ValueError, ["granularity", "causal", "future"]),
        ({"sparsity": 0.1}, ValueError, ["sparsity", "simplex", "capped"]),
        ({"sparsity": -0.1, "constraint": "capped"}, ValueError, ["sparsity", "at least 0"]),
        ({"ridge": 0.0}, ValueError, ["ridge", "greater than 0"]),
        ({"temperature": -1}, ValueError, ["temperature", "at least 0"]),
        ({"temperature": float("nan")}, TypeError, ["temperature", "finite", "nan"]),
        ({"dilation": -1}, ValueError, ["dilation", "at least 0"]),
    ],
)
def test_wrong_options_are_named(options, error, named):
    with pytest.raises(error) as caught:
        AttentionSpec(**{"hidden_size": 256, "num_heads": 4, **options})
    for word in named:
        assert word in str(caught.value)


def test_penalties_are_accepted_where_they_act():
    AttentionSpec(hidden_size=8, num_heads=1, fusion="nash", sparsity=0.1)
    AttentionSpec(hidden_size=8, num_heads=1, constraint="capped", sparsity=0.1)
