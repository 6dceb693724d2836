"""What an evaluation found, on the terminal, and the picture of it."""

from pathlib import Path
from typing import Any

from maha_attn.report.table import metrics_table, perplexity_table


def show(result: dict[str, Any], file: Path, picture: Path) -> None:
    """Print what an evaluation found, and draw what can be drawn.

    Args:
        result: The content of evaluation.json.
        file: Where that is.
        picture: Where to draw how much each scale was used.
    """
    is_text = "perplexities" in result
    print(f"\n{perplexity_table(result) if is_text else metrics_table(result['metrics'])}\n")
    for sample in result.get("samples", []):
        print("\n".join(f"{name}: {text}" for name, text in sample.items()) + "\n")
    if "sample" in result:
        print(f"Generated:\n{result['sample']['text']}\n")
    print(f"Results: {file}")
    if "scale_usage" not in result:
        return
    if not result["scale_usage"]:
        print("No picture of the scales: no layer has more than one.")
        return
    try:
        from maha_attn.report.scales import draw_scale_usage
    except ModuleNotFoundError:
        print("No picture of the scales: pip install 'maha-attn[plot]' for it.")
        return
    draw_scale_usage(result, picture)
    print(f"How much each scale was used: {picture}")


def show_seeds(summary: dict[str, Any], file: Path) -> None:
    """Print what runs with several seeds found.

    Args:
        summary: The content of summary.json.
        file: Where that is.
    """
    seeds = ", ".join(map(str, summary["seeds"]))
    print(f"\nMean and standard deviation over seeds {seeds}")
    print(f"\n{metrics_table(summary['metrics'])}\n\nResults: {file}")
