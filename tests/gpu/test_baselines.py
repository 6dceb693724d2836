"""The attentions on a GPU: their properties there, and what they cost."""

import json

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from maha_attn import AttentionSpec
from maha_attn.baselines import ATTENTIONS, build_attention
from maha_attn.cli import main

pytest.importorskip("transformers")
pytest.importorskip("rich")
from maha_attn.baselines.properties import find_properties

pytestmark = pytest.mark.gpu

LIBRARIES = {
    "performer": ("performer_pytorch",),
    "performer_relu": ("performer_pytorch",),
    "linformer": ("linformer",),
    "native_sparse": ("fla",),
}
HALF = {"native_sparse", "gated_deltanet"}
"""Their kernels are for half precision."""
MORE = {"bigbird": {"autocast": True}}
"""What is not registered, since a CPU lacks it."""


@pytest.mark.parametrize("name", ATTENTIONS)
def test_registered_as_found(name):
    for package in LIBRARIES.get(name, ()):
        pytest.importorskip(package)
    found = find_properties(name, "cuda", torch.bfloat16 if name in HALF else torch.float32)
    registered = {key: getattr(ATTENTIONS[name], key) for key in found}
    assert found == registered | MORE.get(name, {})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["sdpa", "materialised"])
def test_full_attention_agrees_with_the_layer_of_one_scale(name, causal):
    torch.manual_seed(0)
    spec = AttentionSpec(hidden_size=256, num_heads=4, causal=causal)
    full, other = (
        build_attention(n, spec, max_length=1000).to("cuda", torch.bfloat16) for n in ("full", name)
    )
    other.q_proj.load_state_dict(full.q_proj[0].state_dict())
    other.k_proj.load_state_dict(full.k_proj[0].state_dict())
    other.v_proj.load_state_dict(full.v_proj.state_dict())
    other.out_proj.load_state_dict(full.out_proj.state_dict())
    x = torch.randn(2, 1000, 256, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(full(x), other(x), rtol=2e-2, atol=2e-2)


def test_training_memory_is_56_percent_below_materialised_attention_at_4096_tokens(tmp_path):
    output = tmp_path / "cost.json"
    main([
        *("bench", "cost", "--what=time", "--lengths=4096", "--tokens=4096", "--width=768"),
        *("--heads=12", "--attentions=maha,full,materialised", "--rounds=2", f"--output={output}"),
    ])  # fmt: skip
    for row in json.loads(output.read_text())["rows"]:
        if row["attention"] == "maha":
            assert row["train_peak_bytes_saved"] >= 0.56, row


def test_time_grows_with_the_length_to_the_power_of_1_25_at_most(tmp_path):
    output = tmp_path / "cost.json"
    main([
        *("bench", "cost", "--what=time", "--lengths=8192,16384,32768,65536", "--rounds=5"),
        *("--directions=causal", "--attentions=maha,sdpa", f"--output={output}"),
    ])  # fmt: skip
    growth = {row["attention"]: row for row in json.loads(output.read_text())["growth"]}
    assert growth["maha"]["lengths"] == [8192, 16384, 32768, 65536]
    assert growth["maha"]["train"] <= 1.25, growth
    assert growth["maha"]["forward"] <= 1.25, growth
    assert growth["sdpa"]["train"] > 1.5, growth
