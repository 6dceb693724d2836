"""Each attention is what its registration says, in both directions: what it can, and what it can't.

A property is found by what the layer does, with the checks of `build_attention` left aside; the
registration must say exactly what was found.
"""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maha_attn import AttentionCache, AttentionSpec
from maha_attn.baselines.registry import ATTENTIONS, layer_spec

LENGTH = 300
"""Tokens of most rows: beyond the lengths at which a sparse attention is full, and not round."""

ON_CPU = [name for name, attention in ATTENTIONS.items() if not attention.needs_gpu]


def make(name: str, *, causal: bool, max_length: int = LENGTH, device: str = "cpu") -> nn.Module:
    """A layer of random parameters, whether or not it is registered for this direction."""
    torch.manual_seed(0)
    heads = 16 if name == "native_sparse" else 2
    spec = AttentionSpec(hidden_size=16 * heads, num_heads=heads, window=8, causal=causal)
    load = ATTENTIONS[name].load()
    if ATTENTIONS[name].cache:
        layer = load(layer_spec(name, spec))
    else:
        layer = load(spec, max_length=max_length, layer_idx=1)
    return layer.to(device).eval()


def tokens(layer: nn.Module, *shape: int, seed: int = 1) -> Tensor:
    """Random inputs ``[*shape, D]`` of the layer's device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    weight = next(layer.parameters())
    x = torch.randn(*shape, layer.spec.hidden_size, generator=generator)
    return x.to(weight)


def run(layer: nn.Module, x: Tensor, real: Tensor | None = None) -> Tensor:
    """One pass with the same random draws as any other; ``real`` as in `attend`."""
    torch.manual_seed(7)
    with torch.no_grad():
        if real is None or isinstance(layer, type(make("maha", causal=True))):
            return layer(x, real)
        return layer.attend(x, real)


def change(layer: nn.Module, cut: int, *, later: bool) -> float:
    """How far tokens on one side of ``cut`` move the outputs on the other side."""
    x = tokens(layer, 1, LENGTH)
    other = x.clone()
    changed, seen = (slice(cut, None), slice(cut)) if later else (slice(cut), slice(cut, None))
    other[:, changed] = 3 * tokens(layer, 1, LENGTH, seed=2)[:, changed]
    return (run(layer, x) - run(layer, other))[:, seen].abs().max().item()


def is_causal(layer: nn.Module) -> bool:
    """No change of later tokens reaches an output (to fp32 rounding, where sums are blocked)."""
    return all(change(layer, cut, later=True) < 1e-5 for cut in (1, 64, 131, 256, LENGTH - 1))


def sees_both_sides(layer: nn.Module) -> bool:
    return all(change(layer, 150, later=later) > 1e-3 for later in (True, False))


def padding(layer: nn.Module) -> str:
    """What padding does; anything may stand in it, but what the interface puts there is zero."""
    length = 170
    x = tokens(layer, 2, LENGTH)
    x[0, length:] = 0
    real = torch.ones(2, LENGTH, dtype=torch.bool, device=x.device)
    real[0, length:] = False
    padded, alone = run(layer, x, real)[:1, :length], run(layer, x[:1, :length])
    if rms(padded - alone) < 1e-5 * rms(alone):
        return "exact"
    x[0, length:] = 3
    other = run(layer, x, real)[:1, :length]
    return "masked" if rms(padded - other) < 1e-5 * rms(padded) else "counted"


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def runs_at(layer: nn.Module, length: int) -> bool:
    try:
        y = run(layer, tokens(layer, 1, length))
    except ValueError:
        return False
    return y.shape[1] == length and bool(y.isfinite().all())


def runs_in_bf16(name: str, *, causal: bool, autocast: bool, device: str = "cpu") -> bool:
    """Forward and backward, near the same layer in fp32."""
    layer = make(name, causal=causal, device=device)
    x = tokens(layer, 2, LENGTH)
    exact = run(layer, x)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        try:
            y = layer.train()(x.requires_grad_())
        except RuntimeError:
            return False
        y.float().square().sum().backward()
        # Random blocks are drawn in training alone, and rounding moves tokens between buckets.
        near = rms(run(layer.eval(), x) - exact) / rms(exact)
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    if any(g is None or not g.isfinite().all() for g in gradients):
        return False
    return near < (0.05 if ATTENTIONS[name].deterministic else 1)


def is_deterministic(layer: nn.Module) -> bool:
    """Twice the same, in evaluation and in training, without touching anybody's random numbers."""
    x = tokens(layer, 1, LENGTH)
    for training in (False, True):
        layer.train(training)
        states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        with torch.no_grad():
            if not torch.equal(layer(x), layer(x)):
                return False
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        assert torch.equal(states[0], after[0])
        assert np.array_equal(states[1], after[1])
        assert states[2] == after[2]
    return True


def decodes(layer: nn.Module) -> bool:
    """Chunks that continue a cache give the whole pass."""
    x = tokens(layer, 1, 40)
    cache = AttentionCache(layer.spec)
    try:
        with torch.no_grad():
            chunks = [layer(part, cache=cache) for part in x.split(15, 1)]
    except ValueError:
        return False
    torch.testing.assert_close(torch.cat(chunks, 1), run(layer, x), rtol=1e-4, atol=1e-5)
    return True


def found(name: str, device: str = "cpu") -> dict[str, bool | str]:
    """The properties, by what the layers do."""
    causal_form, other_form = (make(name, causal=causal, device=device) for causal in (True, False))
    causal, bidirectional = is_causal(causal_form), sees_both_sides(other_form)
    form = causal_form if causal else other_form
    deterministic = is_deterministic(form)
    lengths = [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, LENGTH]
    assert all(runs_at(make(name, causal=causal, device=device), n) for n in lengths)
    return {
        "causal": causal,
        "bidirectional": bidirectional,
        "padding": padding(other_form) if bidirectional else "exact",
        "any_length": runs_at(make(name, causal=causal, max_length=99, device=device), 100),
        "bf16": runs_in_bf16(name, causal=causal, autocast=False, device=device),
        "autocast": runs_in_bf16(name, causal=causal, autocast=True, device=device),
        "deterministic": deterministic,
        "cache": causal and decodes(causal_form),
    }


@pytest.mark.parametrize("name", ON_CPU)
def test_registered_as_found(name):
    properties = found(name)
    assert properties == {key: getattr(ATTENTIONS[name], key) for key in properties}
