"""A picture of how much each scale was used in each layer."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_scale_usage(evaluation: dict[str, Any], path: Path) -> None:
    """Draw the mean fusion weight per layer and scale: bars over heads, a dot for each head.

    Args:
        evaluation: The content of evaluation.json; its ``scale_usage`` is not empty.
        path: The PNG to write.
    """
    layers = evaluation["scale_usage"]
    strides = max((layer["strides"] for layer in layers), key=len)
    figure = Figure(figsize=(max(7.5, 1.6 * len(layers) + 2.5), 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(strides)
    for scale, stride in enumerate(strides):
        color = f"C{scale}"
        label = "1 token" if stride == 1 else f"{stride} tokens"
        for layer in (layer for layer in layers if scale < len(layer["strides"])):
            heads = [weights[scale] for weights in layer["weights"]]
            x = layer["layer"] + (scale - (len(strides) - 1) / 2) * width
            axes.bar(x, sum(heads) / len(heads), 0.9 * width, color=color, alpha=0.6, label=label)
            axes.plot([x] * len(heads), heads, "o", color=color, markersize=3)
            label = None
    axes.set_xticks([layer["layer"] for layer in layers])
    axes.set_xlabel("layer (0 is next to the embedding)")
    axes.set_ylabel("mean fusion weight")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    figure.suptitle("How much each scale was used on held-out text (dots: heads)", fontsize=11)
    figure.legend(title="one position sums up", loc="outside right center", fontsize=9)
    figure.savefig(path)
