"""The numbers of an evaluation as a table for the terminal."""

import math
from typing import Any

_PERPLEXITIES = (("perplexity", 14, 2), ("word_perplexity", 14, 1), ("bits_per_byte", 16, 3))
"""Columns, their widths and digits."""


def perplexity_table(evaluation: dict[str, Any]) -> str:
    """Lay out what evaluation.json holds, one model a line.

    Args:
        evaluation: The content of evaluation.json.
    """
    units = evaluation["held_out"]
    lines = [
        f"Held out: {units['tokens']:,} scored tokens, {units['words']:,} words, "
        f"{units['bytes']:,} bytes",
        "",
        f"{'model':<10}{'perplexity':>14}{'per word':>14}{'bits per byte':>16}",
    ]
    found = evaluation["perplexities"]
    for name, values in found.items():
        cells = (
            "–".rjust(width) if (value := values[column]) is None else f"{value:{width}.{digits}f}"
            for column, width, digits in _PERPLEXITIES
        )
        lines.append(f"{name:<10}" + "".join(cells))
    best = min(found, key=lambda name: found[name]["perplexity"] or math.inf)
    if best != "maha":
        lines += ["", f"Counting ({best}) predicts this text better: train on more of it."]
    return "\n".join(lines)


def metrics_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Lay out ``metrics`` of evaluation.json or, with means and spreads, of summary.json.

    Args:
        metrics: Numbers by part and name.
    """
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    lines = [f"{'':<26}" + "".join(f"{part:>22}" for part in metrics)]
    for name in names:
        cells = (_cell(values.get(name)) for values in metrics.values())
        lines.append(f"{name.replace('_', ' '):<26}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A number, or a mean with its spread."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        spread = "" if value["std"] is None else f" ± {value['std']:.2f}"
        return f"{value['mean']:.2f}{spread}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
