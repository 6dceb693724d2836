"""The perplexities of an evaluation as a table for the terminal."""

from typing import Any


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
    for name, values in evaluation["perplexities"].items():
        lines.append(
            f"{name:<10}{values['perplexity']:>14.2f}{values['word_perplexity']:>14.1f}"
            f"{values['bits_per_byte']:>16.3f}"
        )
    return "\n".join(lines)
