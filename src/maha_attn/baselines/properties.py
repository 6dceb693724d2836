"""Find out what an attention can and cannot do by what its layer does, whatever its paper says.

Each property of `maha_attn.baselines.Attention` is measured on a small layer of random parameters,
with the refusals of `build_attention` left aside; the tests hold the registration against it.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maha_attn.baselines.interface import BaselineAttention
from maha_attn.baselines.registry import ATTENTIONS, layer_spec
from maha_attn.layers.cache import AttentionCache
from maha_attn.spec import AttentionSpec

LENGTH = 300
"""Tokens of most rows: beyond the lengths up to which a sparse attention is full; not round."""

LENGTHS = (1, 2, 3, 7, 8, 9, 63, 64, 65, 127, LENGTH)


def find_properties(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, bool | str]:
    """The properties of the attention ``name``, by the names that `Attention` gives them.

    Args:
        name: A key of `ATTENTIONS`.
        device: Where to run it.
        dtype: Of weights and tokens, but for ``bf16`` and ``autocast``.

    Raises:
        RuntimeError: It fails at one of `LENGTHS`.
    """
    forms = {c: make_layer(name, causal=c).to(device, dtype) for c in (True, False)}
    causal, bidirectional = is_causal(forms[True]), sees_both_sides(forms[False])
    form = forms[causal]
    for length in LENGTHS:
        if not runs_at(form, length):
            raise RuntimeError(f"{name} fails at {length} tokens")
    short = make_layer(name, causal=causal, max_length=99).to(device, dtype)
    return {
        "causal": causal,
        "bidirectional": bidirectional,
        "padding": padding(forms[False]) if bidirectional else "exact",
        "any_length": runs_at(short, 100),
        "bf16": runs_in_bf16(name, causal, device, dtype, autocast=False),
        "autocast": runs_in_bf16(name, causal, device, dtype, autocast=True),
        "deterministic": is_deterministic(form),
        "cache": causal and decodes(form),
    }


def make_layer(name: str, *, causal: bool, max_length: int = LENGTH) -> Any:
    """A small layer of random parameters, whether or not it is registered for this direction."""
    torch.manual_seed(0)
    # Kernels of native sparse attention want many heads, and wide ones.
    heads, head_dim = (16, 64) if name == "native_sparse" else (2, 16)
    spec = AttentionSpec(hidden_size=heads * head_dim, num_heads=heads, window=8, causal=causal)
    kind = ATTENTIONS[name].load()
    if ATTENTIONS[name].cache:
        return kind(layer_spec(name, spec)).eval()
    return kind(spec, max_length=max_length, layer_idx=1).eval()


def is_causal(layer: Any) -> bool:
    """No change of later tokens reaches an output, beyond the rounding of sums over blocks."""
    return all(_change(layer, cut, later=True) < 1e-5 for cut in (1, 64, 131, 256, LENGTH - 1))


def sees_both_sides(layer: Any) -> bool:
    """Outputs depend on later tokens and on earlier ones."""
    return all(_change(layer, LENGTH // 2, later=later) > 1e-3 for later in (True, False))


def padding(layer: Any) -> str:
    """What padding does: see `Attention.padding`. Anything may stand in it; usually it is zero."""
    length = 170
    x = _tokens(layer, 2, LENGTH)
    x[0, length:] = 0
    real = torch.ones(2, LENGTH, dtype=torch.bool, device=x.device)
    real[0, length:] = False
    padded, alone = _run(layer, x, real)[:1, :length], _run(layer, x[:1, :length])
    if _rms(padded - alone) < 3e-4 * _rms(alone):
        return "exact"
    x[0, length:] = 3
    other = _run(layer, x, real)[:1, :length]
    return "masked" if _rms(padded - other) < 3e-4 * _rms(padded) else "counted"


def runs_at(layer: Any, length: int) -> bool:
    """A row of this length gives finite outputs; a ValueError says that it does not run."""
    try:
        y = _run(layer, _tokens(layer, 1, length))
    except ValueError:
        return False
    return y.shape[1] == length and bool(y.isfinite().all())


def runs_in_bf16(
    name: str, causal: bool, device: str, dtype: torch.dtype, *, autocast: bool
) -> bool:
    """Forward and backward, with finite gradients; near the same layer in fp32 if it runs so."""
    layer = make_layer(name, causal=causal).to(device)
    x = _tokens(layer, 2, LENGTH)
    exact = _run(layer, x) if dtype == torch.float32 else None
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        try:
            y = layer.train()(x.requires_grad_())
        except RuntimeError:
            return False
        y.float().square().sum().backward()
        near = _run(layer.eval(), x)
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    if any(g is None or not g.isfinite().all() for g in gradients):
        return False
    # Rounding moves tokens between random buckets.
    tolerance = 0.05 if ATTENTIONS[name].deterministic else 1
    return exact is None or _rms(near - exact) < tolerance * _rms(exact)


def is_deterministic(layer: Any) -> bool:
    """Twice the same, in evaluation and in training, and nobody's random numbers are drawn."""
    x = _tokens(layer, 1, LENGTH)
    for training in (False, True):
        layer.train(training)
        before = _random_states()
        with torch.no_grad():
            if not torch.equal(layer(x), layer(x)) or _random_states() != before:
                return False
    return True


def decodes(layer: Any) -> bool:
    """Chunks that continue a cache give the whole pass."""
    x = _tokens(layer, 1, 40)
    cache = AttentionCache(layer.spec)
    try:
        with torch.no_grad():
            chunks = [layer(part, cache=cache) for part in x.split(15, 1)]
    except ValueError:
        return False
    whole = _run(layer, x)
    return _rms(torch.cat(chunks, 1) - whole) < 1e-3 * _rms(whole)


def _change(layer: Any, cut: int, *, later: bool) -> float:
    """How far tokens on one side of ``cut`` move the outputs on the other side."""
    x = _tokens(layer, 1, LENGTH)
    other = x.clone()
    changed, seen = (slice(cut, None), slice(cut)) if later else (slice(cut), slice(cut, None))
    other[:, changed] = 3 * _tokens(layer, 1, LENGTH, seed=2)[:, changed]
    return (_run(layer, x) - _run(layer, other))[:, seen].abs().max().item()


def _run(layer: Any, x: Tensor, real: Tensor | None = None) -> Tensor:
    """One pass with the same random draws as any other; ``real`` as in `attend`."""
    torch.manual_seed(7)
    with torch.no_grad():
        attend = layer.attend if isinstance(layer, BaselineAttention) else layer
        return attend(x, real).float()


def _tokens(layer: Any, rows: int, length: int, seed: int = 1) -> Tensor:
    """Random inputs of the layer's device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, layer.spec.hidden_size, generator=generator)
    return x.to(next(layer.parameters()))


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def _random_states() -> tuple[Any, ...]:
    """Of every generator that a library might touch, comparable."""
    numpy = np.random.get_state()  # noqa: NPY002 - whose global state is what is watched.
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None
    return torch.get_rng_state().tolist(), cuda, numpy[1].tolist(), random.getstate()  # pyright: ignore
