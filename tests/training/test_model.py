"""Models that start from saved ones."""

from pathlib import Path

import pytest

from maha_attn.models import MahaConfig
from maha_attn.training.model import with_pretrained


@pytest.mark.parametrize(("attention", "length"), [("linformer", 32), ("maha", 64)])
def test_the_length_is_free_unless_weights_have_a_line_for_each_position(
    tmp_path: Path, attention: str, length: int
) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = MahaConfig(layer_types=[attention], causal=False, max_position_embeddings=32, **sizes)
    config.save_pretrained(tmp_path)
    options = with_pretrained({"max_position_embeddings": 64, "num_scales": 9}, tmp_path)
    assert options["max_position_embeddings"] == length
    assert options["num_scales"] == config.num_scales
