"""The report's panels as one PNG an exhibit, for where no script runs: drawn by matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from maha_attn.report.style import Panel

DASHES = {"dot": ":", "dash": "--"}
MARKERS = {"circle-open": "o", "diamond-open": "D"}


def save_picture(panels: Sequence[Panel], path: Path) -> None:
    """Draw what the page shows before anyone touches it: points, lines, error bars, matrices.

    Args:
        panels: Of one exhibit.
        path: The PNG.
    """
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    width = 8.0 if columns == 1 else 5.0 * columns
    figure = Figure(figsize=(width, 3.9 * rows), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    legend: dict[str, Any] = {}
    for axes, panel in zip(cells, panels, strict=False):
        _draw(axes, panel, figure)
        meta: Any = panel.figure.layout
        if meta.meta["legend"]:
            handles, labels = axes.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
    for axes in cells[len(panels) :]:
        axes.remove()
    if legend:
        place = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
        figure.legend(legend.values(), legend.keys(), ncols=min(columns + 2, len(legend)), **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, panel: Panel, figure: Figure) -> None:
    """One panel."""
    drawn: Any = panel.figure  # plotly's objects have no types
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    for trace in drawn.data:
        if trace.visible is False:
            continue
        if trace.type == "heatmap":
            colors = LinearSegmentedColormap.from_list("page", list(trace.colorscale))
            options = {
                "cmap": colors,
                "vmin": 0,
                "vmax": trace.zmax,
                "aspect": "auto",
                "interpolation": "nearest",
            }
            image = axes.imshow(trace.z, **options)
            figure.colorbar(image, ax=axes, label=trace.colorbar.title.text)
        else:
            _line(axes, trace)
    for shape in drawn.layout.shapes:
        style = {"color": shape.line.color, "linestyle": "--", "linewidth": 0.8}
        if shape.x0 == shape.x1:
            axes.axvline(shape.x0, **style)
        else:
            axes.axhline(shape.y0, **style)
    _label(axes, drawn.layout)


def _line(axes: Axes, trace: Any) -> None:
    """A scatter trace: a line, points, or both, with error bars."""
    marker = MARKERS.get(trace.marker.symbol, "o") if "markers" in trace.mode else ""
    open_ = str(trace.marker.symbol).endswith("-open")
    color = trace.line.color or trace.marker.color
    bars = trace.error_y
    errors = None
    if bars.array is not None:
        errors = [bars.arrayminus if bars.arrayminus is not None else bars.array, bars.array]
    axes.errorbar(
        list(trace.x),
        [math.nan if y is None else y for y in trace.y],
        yerr=errors,
        label=trace.name,
        color=color,
        linestyle=DASHES.get(trace.line.dash, "-") if "lines" in trace.mode else "",
        linewidth=trace.line.width or 1.6,
        marker=marker,
        markersize=0.6 * (trace.marker.size or 7),
        markerfacecolor="none" if open_ else color,
        alpha=trace.marker.opacity,
        elinewidth=0.8,
        capsize=2 if errors else 0,
    )


def _label(axes: Axes, layout: Any) -> None:
    """Scales, ticks and titles of the axes."""
    matrix = bool(axes.images)
    axes.set(xlabel=layout.xaxis.title.text, ylabel=layout.yaxis.title.text)
    if layout.xaxis.type == "log":
        axes.set_xscale("log")
    if layout.yaxis.type == "log":
        axes.set_yscale("log")
    if layout.yaxis.range is not None:
        axes.set_ylim(*layout.yaxis.range)
    for note in layout.annotations:
        style = {"ha": note.xanchor, "va": note.yanchor, "color": note.font.color}
        axes.annotate(note.text, (note.x, note.y), fontsize=8, **style)
    for axis, options in ((axes.xaxis, layout.xaxis), (axes.yaxis, layout.yaxis)):
        if options.tickvals is not None:
            axis.set_ticks(list(options.tickvals), list(options.ticktext))
            axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7 if matrix else 8)
    if matrix:
        axes.tick_params(axis="x", rotation=60)
    else:
        axes.grid(color="#eceef2")
        axes.spines[["top", "right"]].set_visible(False)
