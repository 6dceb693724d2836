"""What a trained model's scales attend to, and how their weights are spread."""

import statistics
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from maha_attn.report.selection import Selected
from maha_attn.report.style import SCALES, Panel, empty_figure
from maha_attn.report.tables import Table

LABELS = 16
"""At most so many labels on an axis of a matrix."""
HOVER = 64
"""Matrices of more rows name no texts where one points: the page would hold all pairs."""


def attention_maps(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each scale of the last layer shown, with buttons for the others."""
    tokens, layers = _explained(selected)
    panels = []
    for index, scale in enumerate(layers[0]["scales"] if layers else []):
        figure, stride = empty_figure(legend=False), scale["stride"]
        for layer in layers:
            figure.add_heatmap(
                **_matrix(tokens, layer["scales"][index]), visible=layer is layers[-1]
            )
        _label_axes(figure, tokens, scale)
        buttons = [
            {
                "label": f"layer {layer['layer']}",
                "method": "update",
                "args": [{"visible": [other is layer for other in layers]}],
            }
            for layer in layers
        ]
        menu = {"buttons": buttons, "type": "buttons", "direction": "right"}
        place = {"x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "pad": {"b": 6}}
        figure.update_layout(updatemenus=[menu | place | {"active": len(layers) - 1}], height=460)
        figure.update_layout(margin={"l": 12, "r": 12, "t": 48, "b": 12})
        title = "single tokens" if stride == 1 else f"blocks of {stride} tokens"
        panels.append(Panel(f"Scale {index}: {title}", figure))
    return panels


def _explained(selected: Sequence[Selected]) -> tuple[list[str], list[dict[str, Any]]]:
    """The passage and the layers of the first result that has them."""
    for result in (result for part in selected for result in part.results):
        if found := result.content.get("attention"):
            return found["tokens"], found["layers"]
    return [], []


def _matrix(tokens: list[str], scale: dict[str, Any]) -> dict[str, Any]:
    """A scale's attention as a heatmap's options."""
    matrix, stride = scale["attention"], scale["stride"]
    keys = [_text(tokens, j, stride) for j in range(len(matrix[0]))]
    step = _query_stride(tokens, scale)
    queries = [_text(tokens, i, step) for i in range(len(matrix))]
    hover, texts = "query %{y}, key %{x}: %{z:.3f}<extra></extra>", None
    if len(matrix) <= HOVER:
        hover = "“%{customdata[0]}” attends to “%{customdata[1]}”: %{z:.3f}<extra></extra>"
        texts = [[[query, key] for key in keys] for query in queries]
    # The first queries see few keys and would take all the colour.
    shares = sorted(share for row in matrix for share in row if share) or [1.0]
    top = shares[int(0.99 * (len(shares) - 1))]
    title = {"text": "attention (largest 1 % alike)", "side": "right"}
    bar = {"thickness": 10, "outlinewidth": 0, "title": title}
    return {
        **{
            "z": matrix,
            "zmin": 0,
            "zmax": top,
            "customdata": texts,
            "hovertemplate": hover,
            "colorbar": bar,
        },
        "colorscale": [[0, "#f6f7f9"], [0.3, "#9db8dd"], [1, "#16366b"]],
    }


def _label_axes(figure: go.Figure, tokens: list[str], scale: dict[str, Any]) -> None:
    """Texts of queries and keys, as many as there is room for."""
    sizes = {"x": len(scale["attention"][0]), "y": len(scale["attention"])}
    strides = {"x": scale["stride"], "y": _query_stride(tokens, scale)}
    for axis, title in (("x", "key"), ("y", "query")):
        places = list(range(0, sizes[axis], -(-sizes[axis] // LABELS)))
        texts = [_short(_text(tokens, i, strides[axis])) for i in places]
        options = {"title": title, "tickvals": places, "ticktext": texts, "showgrid": False}
        figure.update_layout({f"{axis}axis": options | {"tickfont": {"size": 10}}})
    figure.update_xaxes(tickangle=-60)
    figure.update_yaxes(autorange="reversed")


def _query_stride(tokens: list[str], scale: dict[str, Any]) -> int:
    """How many tokens a row of the matrix stands for: one, where queries are fine."""
    return 1 if len(scale["attention"]) == len(tokens) else scale["stride"]


def _text(tokens: list[str], index: int, stride: int) -> str:
    return "".join(tokens[index * stride : (index + 1) * stride]).replace("\n", "⏎")


def _short(text: str, most: int = 14) -> str:
    text = text.strip() or "␣"
    return text if len(text) <= most else f"…{text[1 - most :]}"


def attention_table(selected: Sequence[Selected]) -> Table | None:
    """How far each scale of the layers shown looks back, on the passage."""
    tokens, layers = _explained(selected)
    rows = []
    for layer in layers:
        for scale in layer["scales"]:
            step, stride = _query_stride(tokens, scale), scale["stride"]
            queries = [
                [((i + 1) * step - (j + 1) * stride, share) for j, share in enumerate(row)]
                for i, row in enumerate(scale["attention"])
                if sum(row) > 0.5  # A query before the first block sees nothing.
            ]
            back = statistics.fmean(sum(d * a for d, a in query) for query in queries)
            own = statistics.fmean(sum(a for d, a in query if d < stride) for query in queries)
            first = statistics.fmean(query[0][1] for query in queries)
            shares = (f"{100 * own:.0f}", f"{100 * first:.0f}")
            rows.append([str(layer["layer"]), str(stride), f"{back:.1f}", *shares])
    if not rows:
        return None
    passage = "".join(tokens).replace("\n", " ").strip()
    shown = passage if len(passage) < 400 else f"{passage[:200]} … {passage[-150:]}"
    columns = ["layer", "tokens a position", "mean distance, tokens"]
    columns += ["on its own position, %", "on the first position, %"]
    note = f"The passage, {len(tokens)} tokens: “{shown}”"
    return Table("How far each scale looks back", columns, rows, [note])


def weight_distribution(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each fusion: mean weight of every scale by layer, with its 5–95 % band.

    The bands are those over tokens, averaged over heads; dots are the heads' means.
    """
    panels = []
    for part in selected:
        for row, results in part.rows.items():
            if fusion := results[0].content.get("fusion"):
                title = part.experiment.rows[row].label
                panels.append(Panel(title, _weights(fusion["layers"])))
    return panels


def _weights(layers: list[dict[str, Any]]) -> go.Figure:
    figure, scales = empty_figure(), layers[0]["strides"]
    for scale, stride in enumerate(scales):
        low, mean, high = zip(*(_band(layer, scale) for layer in layers), strict=True)
        beside = 0.18 * (scale - (len(scales) - 1) / 2)
        x = [layer["layer"] + beside for layer in layers]
        label = "1 token" if stride == 1 else f"{stride} tokens"
        heads = [(x[i], h[scale]) for i, layer in enumerate(layers) for h in layer["mean"]]
        figure.add_scatter(
            x=[place for place, _ in heads],
            y=[weight for _, weight in heads],
            name=label,
            mode="markers",
            line={"color": SCALES[scale]},
            marker={"color": SCALES[scale], "size": 4, "opacity": 0.45},
        )
        figure.add_scatter(
            x=x,
            y=mean,
            name=label,
            mode="lines+markers",
            line={"color": SCALES[scale]},
            error_y={
                "array": [max(h - m, 0.0) for h, m in zip(high, mean, strict=True)],
                "arrayminus": [max(m - lo, 0.0) for m, lo in zip(mean, low, strict=True)],
                "thickness": 1,
                "width": 3,
            },
        )
    figure.update_xaxes(title="layer", dtick=1, showgrid=False)
    figure.update_yaxes(title="weight")
    return figure.update_layout(height=340)


def _band(layer: dict[str, Any], scale: int) -> tuple[float, float, float]:
    """Lowest quantile, mean and highest quantile of a scale's weight, averaged over heads."""
    heads = [
        (quantiles[scale][0], mean[scale], quantiles[scale][-1])
        for mean, quantiles in zip(layer["mean"], layer["quantiles"], strict=True)
    ]
    low, middle, high = (statistics.fmean(values) for values in zip(*heads, strict=True))
    return low, middle, high
