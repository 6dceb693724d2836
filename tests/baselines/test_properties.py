"""Each attention is what its registration says, in both directions: what it can and cannot do."""

import dataclasses

import pytest
import torch

from maha_attn.baselines import ATTENTIONS
from maha_attn.baselines import properties as found_by

ON_CPU = [name for name, attention in ATTENTIONS.items() if not attention.needs_gpu]


@pytest.mark.parametrize("name", ON_CPU)
def test_registered_as_found(name):
    found = found_by.find_properties(name)
    assert found == {key: getattr(ATTENTIONS[name], key) for key in found}


def test_every_property_is_looked_for():
    said = {"module", "source", "needs_gpu", "one_way", "note"}  # Of which nothing can be found.
    properties = {field.name for field in dataclasses.fields(ATTENTIONS["maha"])} - said
    assert set(found_by.find_properties("sdpa")) == properties


def test_the_search_finds_faults():
    """Layers with one fault each, which the checks must not overlook."""
    layer = found_by.make_layer("sliding", causal=True)
    assert found_by.is_causal(layer)
    forward = layer.forward

    def leak(x, *arguments, **options):
        return forward(x, *arguments, **options) + 1e-4 * x.amax(1, keepdim=True)

    layer.forward = leak
    assert not found_by.is_causal(layer)
    layer.forward = lambda x, *_: forward(x) + torch.rand(())
    assert not found_by.is_deterministic(layer)
    layer.forward = lambda x, *_: (torch.rand(()), forward(x))[1]  # The same, at others' cost.
    assert not found_by.is_deterministic(layer)
    bidirectional = found_by.make_layer("sdpa", causal=False)
    attend = bidirectional.attend
    bidirectional.attend = lambda x, real: attend(x, None)
    assert found_by.padding(bidirectional) == "counted"
    bidirectional.attend = lambda x, real: attend(x, real) if x.shape[1] > 1 else x / 0
    assert not found_by.runs_at(bidirectional, 1)
