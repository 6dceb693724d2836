"""The report's figures: results in, panels of plotly out."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from maha_attn.experiments.results import Result
from maha_attn.report.metrics import metric, value
from maha_attn.report.selection import Selected

COLORS = {
    **{"full": "#3d4451", "sliding": "#98a1b0", "mean": "#c08a00", "static": "#b3562b"},
    **{"gate": "#2a8c82", "convex": "#2456a6", "nash": "#a23b72", "paper": "#a23b72"},
    **{"linear": "#2456a6", "linear-fine": "#2a8c82", "linear-ratio-4": "#c08a00"},
}
"""A row has the same colour in every figure."""
SCALES = ["#2456a6", "#2a8c82", "#c08a00", "#b3562b", "#a23b72", "#6b7280", "#98a1b0", "#3d4451"]
_SPARE = ["#6a51a3", "#7a8b2f", "#d0627c", "#4f93c0", "#8c6d46"]
HEIGHT = 380


@dataclass(frozen=True)
class Panel:
    """One picture of a figure."""

    title: str
    figure: go.Figure


Drawing = Callable[[Sequence[Selected], dict[str, Any]], list[Panel]]


def draw(name: str, selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """Draw an exhibit; no panel where nothing was run.

    Raises:
        ValueError: There is no drawing of this name.
    """
    if name not in DRAWINGS:
        raise ValueError(f"no drawing {name!r}; there are {', '.join(DRAWINGS)}")
    if not any(part.rows for part in selected):
        return []
    return DRAWINGS[name](selected, options)


def growth(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A metric against length, both logarithmic."""
    name, figure = options["metric"], _figure()
    scale = metric(name).scale
    for part, row, results, color in _colored(selected):
        curves = results[0]["curves"]
        figure.add_scatter(
            x=curves["length"],
            y=[None if y is None else y / scale for y in curves[name]],
            name=part.experiment.rows[row].label,
            mode="lines+markers",
            line={"color": color, "dash": "dot" if row.endswith("bidirectional") else "solid"},
        )
    lengths = selected[0].results[0]["curves"]["length"]
    figure.add_vline(x=options["mark"], line={"color": "#98a1b0", "dash": "dash", "width": 1})
    ticks = {"tickvals": lengths, "ticktext": [_tokens(n) for n in lengths]}
    figure.update_xaxes(type="log", title="tokens", **ticks)
    figure.update_yaxes(type="log", title=metric(name).label, exponentformat="power", dtick=1)
    return [Panel("", figure)]


def loss_curves(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """Training loss against tokens seen, smoothed."""
    figure = _figure()
    for part, row, results, color in _colored(selected):
        for result in results:
            curves = result["curves"]
            figure.add_scatter(
                x=[tokens / 1e6 for tokens in curves["tokens"]],
                y=_smooth(curves["loss"]),
                name=part.experiment.rows[row].label,
                legendgroup=row,
                mode="lines",
                line={"color": color, "width": 1.5},
                hovertemplate=f"seed {result['seed']}: %{{y:.3f}}",
            )
    figure.update_xaxes(title="million tokens")
    figure.update_yaxes(title="training loss, nats per token")
    return [Panel("", figure)]


def by_position(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """Loss against the number of tokens before the predicted one."""
    figure = _figure()
    for part, row, results, color in _colored(selected):
        if not all(result.content.get("positions") for result in results):
            continue
        bins = list(zip(*(result["positions"] for result in results), strict=True))
        figure.add_scatter(
            x=[math.sqrt(seeds[0]["from"] * seeds[0]["to"]) for seeds in bins],
            y=[statistics.fmean(seed["nll"] for seed in seeds) / math.log(2) for seeds in bins],
            customdata=[f"{seeds[0]['from']} to {seeds[0]['to'] - 1}" for seeds in bins],
            hovertemplate="%{customdata} tokens before: %{y:.3f}",
            name=part.experiment.rows[row].label,
            mode="lines+markers",
            line={"color": color},
        )
    figure.update_xaxes(type="log", title="tokens before the predicted one", dtick=1)
    figure.update_yaxes(title="bits per token, held-out books")
    return [Panel("Loss by position in the context", figure)]


def ablation(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each option: bits per byte of its values, a dot a seed, a line of means."""
    panels = []
    for part in selected:
        column = part.part.columns[0]
        scores = {row: _values(results, column) for row, results in part.rows.items()}
        reference = scores.get(options["reference"])
        for group, labels in part.part.groups.items():
            rows = [row for row in labels if scores.get(row)]
            if not rows:
                continue
            figure = _figure(legend=False)
            means = [statistics.fmean(scores[row]) for row in rows]
            names = [str(labels[row]) for row in rows]
            line = {"color": COLORS["convex"]}
            figure.add_scatter(x=names, y=means, mode="lines+markers", name="mean", line=line)
            dots = [(name, y) for name, row in zip(names, rows, strict=True) for y in scores[row]]
            figure.add_scatter(
                x=[name for name, _ in dots],
                y=[y for _, y in dots],
                mode="markers",
                name="seed",
                marker={"color": COLORS["convex"], "symbol": "circle-open", "size": 9},
            )
            if reference:
                label = part.experiment.rows[options["reference"]].label
                height, line = statistics.fmean(reference), {"color": COLORS["sliding"]}
                figure.add_scatter(
                    x=[names[0], names[-1]],
                    y=[height, height],
                    mode="lines",
                    name=label,
                    line=line | {"dash": "dash"},
                )
                style = {"showarrow": False, "xanchor": "right", "yanchor": "bottom"}
                font = {"size": 11, "color": "#6b7280"}
                figure.add_annotation(x=names[-1], y=height, text=label, font=font, **style)
            figure.update_xaxes(type="category", title=group)
            figure.update_yaxes(title=metric(column).label)
            panels.append(Panel("", figure.update_layout(height=300)))
    return panels


def attention_maps(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each scale of the last layer shown, with buttons for the others."""
    result = selected[0].results[0]
    tokens, layers = result["attention"]["tokens"], result["attention"]["layers"]
    panels = []
    for index, scale in enumerate(layers[0]["scales"] if layers else []):
        stride = scale["stride"]
        labels = [_block(tokens, j, stride) for j in range(len(scale["attention"]))]
        figure = _figure(legend=False)
        for layer in layers:
            figure.add_heatmap(
                z=layer["scales"][index]["attention"],
                x=labels[: len(layer["scales"][index]["attention"][0])],
                y=labels,
                visible=layer is layers[-1],
                colorscale=[[0, "#f6f7f9"], [0.3, "#9db8dd"], [1, "#16366b"]],
                showscale=False,
                hovertemplate="%{y} → %{x}: %{z:.3f}<extra></extra>",
            )
        buttons = [
            {
                "label": f"layer {layer['layer']}",
                "method": "update",
                "args": [{"visible": [other is layer for other in layers]}],
            }
            for layer in layers
        ]
        menu = {"buttons": buttons, "type": "buttons", "direction": "right", "active": 2}
        place = {"x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "pad": {"b": 6}}
        figure.update_layout(updatemenus=[menu | place], height=380)
        figure.update_layout(margin={"l": 12, "r": 12, "t": 48, "b": 40})
        figure.update_xaxes(showticklabels=False, ticks="", title="key")
        figure.update_yaxes(showticklabels=False, ticks="", title="query", autorange="reversed")
        title = "tokens" if stride == 1 else f"blocks of {stride} tokens"
        panels.append(Panel(f"Scale {index}: {title}", figure))
    return panels


def weight_distribution(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each fusion: mean weight of every scale by layer, with its 5–95 % band."""
    panels = []
    for part in selected:
        for row, results in part.rows.items():
            fusion = results[0].content.get("fusion")
            if not fusion:
                continue
            figure, layers = _figure(), fusion["layers"]
            for scale, stride in enumerate(layers[0]["strides"]):
                low, mean, high = zip(*(_band(layer, scale) for layer in layers), strict=True)
                beside = 0.1 * (scale - (len(layers[0]["strides"]) - 1) / 2)
                x = [layer["layer"] + beside for layer in layers]
                label = "1 token" if stride == 1 else f"{stride} tokens"
                figure.add_scatter(
                    x=x,
                    y=mean,
                    name=label,
                    mode="lines+markers",
                    line={"color": SCALES[scale]},
                    error_y={
                        "array": [h - m for h, m in zip(high, mean, strict=True)],
                        "arrayminus": [m - lo for m, lo in zip(mean, low, strict=True)],
                        "thickness": 1,
                        "width": 3,
                    },
                )
            figure.update_xaxes(title="layer", dtick=1, showgrid=False)
            figure.update_yaxes(title="weight, mean and 5–95 %", range=[-0.02, 1.02])
            title = f"{part.experiment.rows[row].label}: {fusion['moved']:.1%} moves"
            panels.append(Panel(title.replace("%", " %"), figure.update_layout(height=340)))
    return panels


DRAWINGS: dict[str, Drawing] = {
    drawing.__name__: drawing
    for drawing in (
        *(growth, loss_curves, by_position, ablation, attention_maps, weight_distribution),
    )
}


def _figure(legend: bool = True) -> go.Figure:
    """An empty figure in the page's style."""
    figure = go.Figure()
    figure.update_layout(
        template="simple_white",
        height=HEIGHT,
        margin={"l": 12, "r": 12, "t": 12, "b": 12},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#3d4451"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        meta={"legend": legend},  # The page draws it below the figure, where it has room.
        hovermode="closest",
    )
    style = {"automargin": True, "showgrid": True, "gridcolor": "#eceef2", "linecolor": "#c6cbd4"}
    figure.update_xaxes(tickcolor="#c6cbd4", **style)
    figure.update_yaxes(tickcolor="#c6cbd4", **style)
    return figure


def _colored(
    selected: Sequence[Selected],
) -> list[tuple[Selected, str, list[Result], str]]:
    """Every row with its results and its colour."""
    spare = cycle(_SPARE)
    return [
        (part, row, results, COLORS.get(row.removesuffix("-bidirectional")) or next(spare))
        for part in selected
        for row, results in part.rows.items()
    ]


def _values(results: list[Result], column: str) -> list[float]:
    return [v for result in results if (v := value(result, column)) is not None]


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last ``width`` values."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 else str(number)


def _block(tokens: list[str], index: int, stride: int) -> str:
    """A position's label: its number and the tokens that it ends with."""
    words = "".join(tokens[index * stride : (index + 1) * stride]).replace("\n", "⏎")
    return f"{index}: {words}"


def _band(layer: dict[str, Any], scale: int) -> tuple[float, float, float]:
    """Lowest quantile, mean and highest quantile of a scale's weight, averaged over heads."""
    heads = [
        (quantiles[scale][0], mean[scale], quantiles[scale][-1])
        for mean, quantiles in zip(layer["mean"], layer["quantiles"], strict=True)
    ]
    low, middle, high = (statistics.fmean(values) for values in zip(*heads, strict=True))
    return low, middle, high
