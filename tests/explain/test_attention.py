"""Matrices of attention: times the values they are what the layer computes."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from maha_attn import AttentionSpec, MultiscaleAttention
from maha_attn.data.tokenizer import train_tokenizer
from maha_attn.explain.attention import attention_matrices, explain_text
from maha_attn.models import MahaConfig, MahaForCausalLM


@pytest.mark.parametrize("queries", ["coarse", "fine"])
@pytest.mark.parametrize("causal", [True, False])
def test_matrices_times_values_weighed_are_the_layers_output(queries: str, causal: bool) -> None:
    torch.manual_seed(0)
    spec = AttentionSpec(
        **{"hidden_size": 16, "num_heads": 2, "num_scales": 3, "window": 4, "queries": queries},
        **{"causal": causal, "gating": True, "dilation": 1},
    )
    layer = MultiscaleAttention(spec).double()
    x = torch.randn(1, 27, 16, dtype=torch.float64)
    y, info = layer(x, return_info=True)
    (values,) = layer.pyramid.scales([layer.v_proj(x)], None)
    fused = torch.zeros(2, 27, 8, dtype=torch.float64)
    matrices = attention_matrices(layer, x)
    assert len(matrices) == 3
    for s, (matrix, value) in enumerate(zip(matrices, values, strict=True)):
        output = torch.einsum("hnm,mhk->hnk", matrix, layer.split(value)[0])
        if queries == "coarse":
            tokens = torch.arange(27)
            block = (tokens + 1) // 2**s - 1 if causal else tokens // 2**s
            output = output[:, block.clamp(min=0)]
        fused += info.weights[0, :, :, s, None] * output
        sums = matrix.sum(-1)
        assert torch.all((sums - 1).abs().lt(1e-12) | sums.eq(0))
    expected = layer.out_proj(fused.transpose(0, 1).flatten(1))
    torch.testing.assert_close(expected, y[0], rtol=0, atol=1e-12)


def test_explained_text() -> None:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["a cat sat on a mat. " * 9], 300)
    config = MahaConfig(
        **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_scales": 2, "window": 4},
        layer_types=["full", "maha", "maha", "maha"],
    )
    ids = tokenizer("a cat sat on a mat.")["input_ids"]
    found = explain_text(MahaForCausalLM(config), tokenizer, ids)
    assert "".join(found["tokens"]) == "a cat sat on a mat."
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3]
    for layer in found["layers"]:
        fine, coarse = layer["scales"]
        assert (fine["stride"], coarse["stride"]) == (1, 2)
        assert len(fine["attention"]) == len(ids)
        assert len(coarse["attention"]) == len(ids) // 2
    none = explain_text(
        MahaForCausalLM(MahaConfig(**{**config.to_dict(), "num_scales": 1})), tokenizer, ids
    )
    assert none["layers"] == []
