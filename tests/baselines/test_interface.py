"""What every baseline shares: its interface, gradients, and errors that say what to do."""

import sys

import pytest
import torch
import torch.nn.functional as F

from maha_attn import AttentionCache, AttentionSpec, MultiscaleAttention
from maha_attn.baselines import ATTENTIONS, build_attention, obstacle

NAMES = [name for name, attention in ATTENTIONS.items() if not attention.needs_gpu]


def build(name: str, *, max_length: int = 100, **options):
    torch.manual_seed(0)
    causal = ATTENTIONS[name].causal if name in ATTENTIONS else True
    options = {"hidden_size": 32, "num_heads": 2, "window": 8, "causal": causal} | options
    return build_attention(name, AttentionSpec(**options), max_length=max_length, layer_idx=1)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Every parameter has one, and the input's agrees with finite differences along a line."""
    layer = build(name).double()
    x, line = torch.randn(2, 2, 61, 32, dtype=torch.float64)

    def loss(shift: float) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x + shift * line).square().sum()

    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    layer(x + shift * line).square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    step = 1e-4
    with torch.no_grad():
        difference = (loss(step) - loss(-step)) / (2 * step)
    # Some compute in fp32 throughout; Performer's stabiliser has no gradient.
    torch.testing.assert_close(shift.grad, difference, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if ATTENTIONS[n].padding != "counted"])
def test_rows_of_different_lengths(name):
    """Padding anywhere: nothing in it is read, zeros come out of it, gradients are finite."""
    layer = build(name).eval()
    x = torch.randn(3, 61, 32)
    mask = torch.ones(3, 61, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 30:40] = False
    mask[2] = False
    outputs = []
    for filling in (0.0, float("nan")):
        filled = torch.where(mask[..., None], x, filling).requires_grad_()
        torch.manual_seed(3)
        y, info = layer(filled, mask, return_info=True)
        y.square().sum().backward()
        assert filled.grad.isfinite().all()
        assert not filled.grad[~mask].any()
        outputs.append(y)
    assert torch.equal(*outputs)
    assert not outputs[0][~mask].any()
    assert outputs[0][mask].abs().amin(-1).gt(0).all()
    assert info.weights.shape[:3] == (3, 2, 61)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_mask_is_no_mask(name):
    layer = build(name).eval()
    x = torch.randn(2, 61, 32)
    outputs = []
    for mask in (None, torch.ones(2, 61, dtype=torch.bool)):
        torch.manual_seed(3)
        outputs.append(layer(x, mask))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "longformer",
            {"causal": True},
            r"longformer has no causal form: its .* maha, full",
        ),
        ("performer", {"causal": True}, "performer has no causal form: the library's leaks"),
        ("mamba2", {"causal": False}, "mamba2 has no bidirectional form: it is a recurrence"),
        ("longformer", {"window": 1}, "window must be at least 2 for longformer, got 1"),
        ("linformer", {"bias": True}, "bias must be False for linformer"),
        ("nothing", {}, r"attention must be one of maha, full, .* got 'nothing'"),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_what_cannot_be_run_is_refused():
    mask = torch.arange(61)[None] < 50
    x = torch.randn(1, 61, 32)
    with pytest.raises(ValueError, match="Performer would count padding as tokens"):
        build("performer")(x, mask)
    with pytest.raises(ValueError, match=r"x must have at most 60 tokens .* got 61"):
        build("linformer", max_length=60)(x)
    with (
        pytest.raises(ValueError, match="autocast must be off: BigBird's library"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        build("bigbird")(x)
    layer = build("mamba2")
    with pytest.raises(ValueError, match="cache must be None: Mamba2 has no decoding cache"):
        layer(x, cache=AttentionCache(layer.spec))
    with pytest.raises(TypeError, match="padding_mask must be boolean"):
        layer(x, mask.long())
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, 32\]"):
        layer(x[..., :16])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "linformer", None)
    monkeypatch.delitem(sys.modules, "maha_attn.baselines.linformer", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maha-attn\[baselines\]'"):
        build("linformer")


def test_every_limit_has_a_reason():
    for name, attention in ATTENTIONS.items():
        assert attention.causal or attention.bidirectional
        one_way = not (attention.causal and attention.bidirectional)
        assert one_way == bool(attention.one_way), name
        assert obstacle(name, causal=attention.causal) is None
    assert ATTENTIONS["maha"].properties() == ""
    assert ATTENTIONS["longformer"].properties() == "not causal"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["sdpa", "materialised"])
def test_full_attentions_are_the_same_function(name, causal):
    full, other = build("full", causal=causal), build(name, causal=causal)
    assert isinstance(full, MultiscaleAttention)
    for mine, theirs in ((full.q_proj[0], other.q_proj), (full.k_proj[0], other.k_proj)):
        theirs.load_state_dict(mine.state_dict())
    other.v_proj.load_state_dict(full.v_proj.state_dict())
    other.out_proj.load_state_dict(full.out_proj.state_dict())
    x = torch.randn(2, 61, 32)
    torch.testing.assert_close(full(x), other(x), rtol=1e-5, atol=1e-6)


def test_longformer_is_the_window():
    """The library's chunks compute what the bidirectional sliding window computes."""
    sliding, other = build("sliding", causal=False), build("longformer")
    other.library.query.load_state_dict(sliding.q_proj[0].state_dict())
    other.library.key.load_state_dict(sliding.k_proj[0].state_dict())
    other.library.value.load_state_dict(sliding.v_proj.state_dict())
    other.out_proj.load_state_dict(sliding.out_proj.state_dict())
    x = torch.randn(2, 61, 32)
    torch.testing.assert_close(sliding(x), other(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1024, 3072, 4096])
def test_bigbirds_old_plans(length):
    """Lengths at which the library places random blocks by the plan of its paper."""
    layer = build("bigbird", window=128, hidden_size=8, num_heads=1)
    assert layer(torch.randn(1, length, 8)).isfinite().all()


def test_random_blocks_differ_between_layers_and_not_between_steps():
    x = torch.randn(1, 90, 32)
    layers = []
    for layer_idx in (1, 1, 2):
        torch.manual_seed(0)
        spec = AttentionSpec(hidden_size=32, num_heads=2, window=8, causal=False)
        layers.append(build_attention("bigbird", spec, max_length=90, layer_idx=layer_idx))
    one, same, other = (layer.train()(x) for layer in layers)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert F.mse_loss(layers[0].eval()(x), one) > 0
