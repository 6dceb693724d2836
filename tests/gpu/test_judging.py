"""How models are judged on a GPU: causality bitwise, frozen weights by the kernels."""

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytest.importorskip("transformers")
from maha_attn.baselines import ATTENTIONS
from maha_attn.evaluation.adaptivity import weight_variation
from maha_attn.evaluation.causality import LeakError, check_causal
from maha_attn.evaluation.frozen import frozen_weights
from maha_attn.models import MahaConfig, MahaForCausalLM

pytestmark = pytest.mark.gpu

WINDOWS = np.random.default_rng(0).integers(0, 500, (4, 1024))
LIBRARIES = {"performer_relu": "performer_pytorch", "native_sparse": "fla"}


def model(name="maha", **options):
    torch.manual_seed(0)
    # Native sparse attention's kernels want 16 heads.
    width, heads = (1024, 16) if name == "native_sparse" else (256, 4)
    config = MahaConfig(
        **{"vocab_size": 500, "hidden_size": width, "intermediate_size": 256, "window": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": heads, "layer_types": [name] * 2},
        **{"initializer_range": 0.1, "max_position_embeddings": 1024, **options},
    )
    return MahaForCausalLM(config).cuda().eval()


@pytest.mark.filterwarnings("ignore:PyTorch operators run")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": f} for f in ("mean", "static", "gate", "convex", "nash")),
        *({"queries": "fine"}, {"ratio": 3}, {"num_scales": 6}, {"downsample": "dense_conv"}),
        *({"downsample": "max"}, {"gating": True, "dilation": 2}),
        *({"num_scales": 1, "preset": "paper"}, {"num_scales": 1, "preset": "window"}),
    ],
)
def test_our_layers_are_causal_bitwise(options, bf16):
    check_causal(model(**options), WINDOWS, bf16)


@pytest.mark.parametrize("name", [n for n, a in ATTENTIONS.items() if a.causal and not a.cache])
def test_libraries_are_causal_within_rounding(name):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    check_causal(model(name), WINDOWS, bf16=True)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_leak_is_found(bf16):
    leaky = model()
    layer = leaky.get_submodule("model.layers.1.attention")
    layer.register_forward_hook(lambda module, arguments, y: y + 0.02 * y.roll(-1, 1))
    with pytest.raises(LeakError, match="looks ahead"):
        check_causal(leaky, WINDOWS, bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fusion", ["gate", "convex", "nash"])
def test_frozen_weights_are_those_of_the_composed_path(fusion, bf16):
    one = model(fusion=fusion)
    found = weight_variation(one, WINDOWS, bf16)
    with frozen_weights(one, found["layers"]), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        fused = one(torch.from_numpy(WINDOWS).cuda(), output_fusion_weights=True)
    for weights, layer in zip(fused.fusion_weights, found["layers"], strict=True):
        mean = torch.tensor(layer["mean"], device="cuda")[None, :, None].expand_as(weights)
        torch.testing.assert_close(weights[:, :, 7:], mean[:, :, 7:], rtol=1e-3, atol=1e-4)
    other = model(fusion=fusion, backend="torch")
    with frozen_weights(other, found["layers"]):
        exact = other(torch.from_numpy(WINDOWS).cuda()).logits
    tolerance = 0.05 if bf16 else 1e-3
    assert (fused.logits - exact).norm() < tolerance * exact.norm()
