"""Tables and pictures from a result file alone."""

import struct
from pathlib import Path

from matplotlib.image import imread

from maha_attn.report.scales import draw_scale_usage
from maha_attn.report.table import perplexity_table

EVALUATION = {
    "held_out": {"tokens": 12345, "words": 6789, "bytes": 34567},
    "perplexities": {
        "maha": {"perplexity": 42.5, "word_perplexity": 1234.56, "bits_per_byte": 1.9876},
        "bigram": {"perplexity": 65.0, "word_perplexity": 3712.1, "bits_per_byte": 2.166},
    },
    "scale_usage": [
        {"layer": 0, "strides": [1, 2, 4], "weights": [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]},
        {"layer": 2, "strides": [1, 2, 4], "weights": [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]},
    ],
}


def test_table() -> None:
    lines = perplexity_table(EVALUATION).splitlines()
    assert lines[0] == "Held out: 12,345 scored tokens, 6,789 words, 34,567 bytes"
    assert lines[3].split() == ["maha", "42.50", "1234.6", "1.988"]
    assert lines[4].split() == ["bigram", "65.00", "3712.1", "2.166"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_counting_that_wins_is_said() -> None:
    found = EVALUATION["perplexities"]
    worse = {**found["maha"], "perplexity": 70.0, "word_perplexity": None}
    text = perplexity_table({**EVALUATION, "perplexities": {**found, "maha": worse}})
    assert text.splitlines()[3].split() == ["maha", "70.00", "–", "1.988"]
    assert "Counting (bigram) predicts this text better" in text
    assert "Counting" not in perplexity_table(EVALUATION)


def test_picture_shows_every_layer_and_scale(tmp_path: Path) -> None:
    path = tmp_path / "scales.png"
    draw_scale_usage(EVALUATION, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 800
    assert height > 500
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    # The dots of the three scales have the first three colours of matplotlib's cycle.
    for color in [(31, 119, 180), (255, 127, 14), (44, 160, 44)]:
        assert (pixels == color).all(axis=-1).sum() > 20
