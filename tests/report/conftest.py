"""Made-up results in the form of real ones."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from maha_attn.experiments.results import result_path, write_result

Add = Callable[..., Path]

LENGTHS = [2**k for k in range(9, 17)]


def write(
    folder: Path, experiment: str, row: str, seed: int = 1, budget: str = "small", **content: Any
) -> Path:
    """Write a result of a row; its numbers can be given."""
    path = result_path(folder, experiment, budget, row, seed)
    document = {
        **{"experiment": experiment, "row": row, "budget": budget, "seed": seed},
        **{"label": row, "command": "maha reproduce x", "commit": "a" * 40},
        **{"date": "2026-11-24T00:00:00+00:00", "device": "H100", "device_class": "gpu"},
        **{"versions": {"torch": "2.13.0"}, "settings": {"s": 1}, "wall_s": 9.0},
        **{"data": {"fingerprint": "f", "rows": {"test": 400}}, "metrics": {"x": 1}},
        **content,
    }
    write_result(path, document)
    return path


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Write a result under ``tmp_path``."""
    return partial(write, tmp_path)


def language_model(bits: float, **metrics: Any) -> dict[str, Any]:
    """A language model's result whose ten books have about so many bits per byte."""
    books = [bits + 0.1 * (i - 4.5) for i in range(10)]
    weights = {
        "mean": [[0.7, 0.2, 0.1]] * 2,
        "quantiles": [[[0.6, 0.65, 0.7, 0.75, 0.8], [0.1] * 5, [0.1] * 5]] * 2,
    }
    layers = [{"layer": i, "strides": [1, 2, 4], **weights} for i in range(3)]
    matrices = [{"stride": 2**s, "attention": [[1.0, 0.0], [0.5, 0.5]]} for s in range(3)]
    return {
        "metrics": {
            **{"bits_per_byte": bits, "perplexity": 2**bits, "word_perplexity": 4**bits},
            **{"bits_per_byte_error": 0.01, "tokens_per_s": 1e5, "peak_bytes": 2**30},
            **{"parameters": 5e7, "final_loss": bits, "perplexity_error": 0.5},
            **{"token_accuracy": 30.0, "static_bits_per_byte": bits + 0.02, "causal": True},
            **{"accuracy": 75.0, **metrics},
        },
        "documents": [
            {
                **{"nll": rate * 1000 * math.log(2), "bytes": 1000, "tokens": 250, "words": 180},
                "static_nll": (rate + 0.02) * 1000 * math.log(2),
                "positions": [[rate * 10.0, 10], [rate * 20.0, 30]],
            }
            for rate in books
        ],
        "positions": [
            {"from": 1, "to": 2, "nll": bits, "error": 0.1},
            {"from": 2, "to": 4, "nll": bits * 2 / 3, "error": 0.1},
        ],
        "correct": "1" * 300 + "0" * 100,
        "curves": {"tokens": [1e6, 2e6, 3e6], "loss": [3.0, 2.5, 2.0]},
        "fusion": {
            **{"moved": 0.3, "moved_untrained": 0.1, "layers": layers},
            "moved_by_head": [[0.2, 0.4]] * 3,
        },
        "attention": {
            "tokens": ["It", " was"],
            "layers": [{"layer": i, "scales": matrices} for i in range(3)],
        },
    }


def flops(pairs: Callable[[int], float]) -> dict[str, Any]:
    """A result of the kind flops."""
    values = [pairs(n) for n in LENGTHS]
    names = ("attention_flops", "layer_flops", "executed_pairs", "visible_pairs")
    names += ("train_ms", "train_speedup", "train_sequences_per_s", "train_peak_bytes")
    return {"curves": {"length": LENGTHS, **{name: values for name in names}}}
