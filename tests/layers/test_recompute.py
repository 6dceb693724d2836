"""Less memory in training: the coarse scales rebuilt, and projections that share a gradient."""

import dataclasses

import pytest
import torch
from torch import nn

from maha_attn import MultiscaleAttention
from maha_attn.layers.projection import project
from maha_attn.ops.rotary import in_pairs


def gradients(layer, x, mask=None):
    """Output and all gradients, and the bytes that autograd keeps for the backward pass."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x, mask)
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
    return [y, *grads], sum(kept.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queries": "fine", "fusion": "nash"},
        {"causal": False, "downsample": "max"},
        {"gating": True, "dilation": 2},
        {"num_scales": 1, "preset": "window"},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 37])
def test_recomputing_changes_memory_alone(make_layer, length, options):
    layer = make_layer(**options)
    again = MultiscaleAttention(dataclasses.replace(layer.spec, recompute=True))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, length, 16, requires_grad=True)
    mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
    (expected, kept), (results, fewer) = (gradients(module, x, mask) for module in (layer, again))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    if length > 1 and layer.spec.num_scales > 1:
        assert fewer < kept


def test_projections_share_a_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    modules = [nn.Linear(8, width, bias=False, dtype=torch.float64) for width in (8, 8, 3)]
    weights = [module.weight for module in modules]
    grads = [torch.randn(2, 5, w.shape[0], dtype=torch.float64) for w in weights]
    together = torch.autograd.grad(project(x, modules), [x, *weights], grads)
    apart = torch.autograd.grad([module(x) for module in modules], [x, *weights], grads)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)
    # One output unused, and a frozen weight.
    weights[1].requires_grad_(False)
    first, second, _ = project(x, modules)
    torch.testing.assert_close(
        torch.autograd.grad((first, second), x, grads[:2])[0],
        grads[0] @ weights[0] + grads[1] @ weights[1],
    )


@pytest.mark.parametrize("bias", [False, True])
def test_heads_are_paired_by_their_weights_or_after(bias):
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    values, queries = (nn.Linear(8, 8, bias=bias, dtype=torch.float64) for _ in range(2))
    results = [
        project(x, [values], heads=[queries], paired=4),
        [values(x), in_pairs(queries(x), 4, -1)],
    ]
    inputs, grads = [x, *values.parameters(), *queries.parameters()], torch.randn_like(x)
    first, second = (
        [*ys, *torch.autograd.grad(ys, inputs, [grads, grads.flip(0)])] for ys in results
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_no_plain_projection_is_called():
    x = torch.randn(1, 4, 8)
    called = []
    hooked = nn.Linear(8, 8, bias=False)
    hooked.register_forward_hook(lambda *_: called.append("hook"))
    biased = nn.Linear(8, 8)
    outputs = project(x, [hooked, biased, nn.Sequential(nn.Linear(8, 2))])
    assert called == ["hook"]
    torch.testing.assert_close(outputs[1], biased(x))
    assert outputs[2].shape == (1, 4, 2)


def test_hooks_of_every_kind_are_called():
    x, called = torch.randn(1, 4, 8, requires_grad=True), []
    hooked, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    hooked.register_full_backward_pre_hook(lambda *_: called.append("backward"))
    y, _ = project(x, [hooked, other])
    y.sum().backward()
    assert called == ["backward"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append("every"))
    project(x, [hooked, other])
    handle.remove()
    assert called == ["backward", "every", "every"]


def test_projections_under_autocast():
    x = torch.randn(2, 4, 8, requires_grad=True)
    modules = [nn.Linear(8, 8, bias=False) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = project(x, modules)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    sum(outputs).float().sum().backward()
    assert x.grad.dtype == modules[0].weight.grad.dtype == torch.float32
