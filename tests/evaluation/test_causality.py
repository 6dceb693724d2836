"""A model that looks ahead is found, wherever it looks, and one that does not passes bitwise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from maha_attn.baselines import ATTENTIONS
from maha_attn.evaluation.causality import LeakError, check_causal
from maha_attn.models import MahaConfig, MahaForCausalLM

WINDOWS = np.random.default_rng(0).integers(0, 61, (2, 64))


def model(name: str = "maha", **options: Any) -> MahaForCausalLM:
    torch.manual_seed(0)
    return MahaForCausalLM(
        MahaConfig(
            **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "window": 8},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "layer_types": [name] * 2},
            **{"initializer_range": 0.2, "max_position_embeddings": 64, **options},
        )
    )


@pytest.mark.parametrize("name", [n for n, a in ATTENTIONS.items() if a.causal and not a.needs_gpu])
def test_no_attention_looks_ahead(name: str) -> None:
    check_causal(model(name), WINDOWS)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": f} for f in ("mean", "static", "gate", "convex", "nash")),
        *({"queries": "fine"}, {"ratio": 3}, {"num_scales": 6}, {"downsample": "dense_conv"}),
        {"gating": True, "dilation": 2},
    ],
)
def test_our_layers_do_not_bitwise(options: dict[str, Any], bf16: bool) -> None:
    check_causal(model(**options), WINDOWS, bf16)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Every token sees a trace of the next one."""
    return x + 1e-3 * x.roll(-1, 1)


def from_block(x: torch.Tensor) -> torch.Tensor:
    """The first token of each block of 4 sees the whole block: right where halves would meet."""
    blocks = x.unflatten(1, (-1, 4)).clone()
    blocks[:, :, 0] += 1e-3 * blocks.mean(2)
    return blocks.flatten(1, 2)


def last(x: torch.Tensor) -> torch.Tensor:
    """All see the last token."""
    return x + 1e-3 * x[:, -1:]


@pytest.mark.parametrize("leak", [shifted, from_block, last])
def test_a_leak_is_found(leak: Callable[[torch.Tensor], torch.Tensor]) -> None:
    leaky = model()
    layer = leaky.get_submodule("model.layers.1.attention")
    layer.register_forward_hook(lambda module, arguments, output: leak(output))
    with pytest.raises(LeakError, match=r"the model looks ahead: .* from place \d+ of 64"):
        check_causal(leaky, WINDOWS)


def test_a_leak_through_a_library_is_found() -> None:
    leaky = model("sdpa")
    layer = leaky.get_submodule("model.layers.0.attention")
    layer.register_forward_hook(lambda module, arguments, output: shifted(output))
    with pytest.raises(LeakError, match="looks ahead"):
        check_causal(leaky, WINDOWS)


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    broken = model()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: its training diverged"):
        check_causal(broken, WINDOWS)
