"""The report's figures: results in, panels of plotly out."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from maha_attn.report.attention import attention_maps, weight_distribution
from maha_attn.report.metrics import metric
from maha_attn.report.positions import by_position
from maha_attn.report.selection import Selected
from maha_attn.report.style import COLORS, MUTED, Panel, colored, empty_figure

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
    """A panel for each of the ``metrics``, against length, both logarithmic.

    ``claimed``: by row, what the paper prints at ``mark`` tokens.
    """
    panels = []
    for name in options["metrics"]:
        figure, known = empty_figure(), metric(name)
        for part, row, results, color in colored(selected):
            curves = results[0]["curves"]
            label, dashes = part.experiment.rows[row].label, row.endswith("bidirectional")
            figure.add_scatter(
                x=curves["length"],
                y=[None if y is None else y / known.scale for y in curves[name]],
                name=label,
                mode="lines+markers",
                line={"color": color, "dash": "dot" if dashes else "solid"},
            )
            if printed := options.get("claimed", {}).get(row):
                figure.add_scatter(
                    x=[options["mark"]],
                    y=[float(printed) / known.scale],
                    name=f"{label}, as printed",
                    mode="markers",
                    line={"color": color},
                    marker={"color": color, "symbol": "diamond-open", "size": 13},
                )
        lengths = selected[0].results[0]["curves"]["length"]
        figure.add_vline(x=options["mark"], line={"color": MUTED, "dash": "dash", "width": 1})
        ticks = {"tickvals": lengths, "ticktext": [_tokens(n) for n in lengths]}
        figure.update_xaxes(type="log", title="tokens", **ticks)
        figure.update_yaxes(type="log", title=known.label, exponentformat="power", dtick=1)
        panels.append(Panel(known.label if len(options["metrics"]) > 1 else "", figure))
    return panels


def loss_curves(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """Training loss against tokens seen, smoothed."""
    figure = empty_figure()
    for part, row, results, color in colored(selected):
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


def ablation(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """A panel for each option: bits per byte of its values, a dot a seed, a line of means."""
    return [
        Panel("", figure)
        for part in selected
        for group, labels in part.part.groups.items()
        if (figure := _option(part, group, labels, options["reference"]))
    ]


def _option(part: Selected, group: str, labels: dict[str, Any], reference: str) -> go.Figure | None:
    """One option's panel; None where no value of it was run."""
    column = part.part.columns[0]
    scores = {row: part.values(results, column) for row, results in part.rows.items()}
    rows = [row for row in labels if scores.get(row)]
    if not rows:
        return None
    figure, line = empty_figure(legend=False), {"color": COLORS["convex"]}
    means = [statistics.fmean(scores[row]) for row in rows]
    names = [str(labels[row]) for row in rows]
    figure.add_scatter(x=names, y=means, mode="lines+markers", name="mean", line=line)
    dots = [(name, y) for name, row in zip(names, rows, strict=True) for y in scores[row]]
    figure.add_scatter(
        x=[name for name, _ in dots],
        y=[y for _, y in dots],
        mode="markers",
        name="seed",
        marker={"color": COLORS["convex"], "symbol": "circle-open", "size": 9},
    )
    if scores.get(reference):
        label = part.experiment.rows[reference].label
        height = statistics.fmean(scores[reference])
        figure.add_scatter(
            x=[names[0], names[-1]],
            y=[height, height],
            mode="lines",
            name=label,
            line={"color": MUTED, "dash": "dash"},
        )
        style = {"showarrow": False, "xanchor": "right", "yanchor": "bottom"}
        font = {"size": 11, "color": "#6b7280"}
        figure.add_annotation(x=len(names) - 1, y=height, text=label, font=font, **style)
    figure.update_xaxes(type="category", title=group)
    figure.update_yaxes(title=metric(column).label)
    return figure.update_layout(height=300)


DRAWINGS: dict[str, Drawing] = {
    drawing.__name__: drawing
    for drawing in (
        *(growth, loss_curves, by_position, ablation, attention_maps, weight_distribution),
    )
}


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last ``width`` values."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 else str(number)
