"""How the report's figures look."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import plotly.graph_objects as go

from maha_attn.experiments.results import Result
from maha_attn.report.selection import Selected

COLORS = {
    **{"full": "#3d4451", "sliding": "#98a1b0", "mean": "#c08a00", "static": "#b3562b"},
    **{"gate": "#2a8c82", "convex": "#2456a6", "nash": "#a23b72", "paper": "#a23b72"},
    **{"linear": "#2456a6", "linear-fine": "#2a8c82", "linear-ratio-4": "#c08a00"},
    **{"maha": "#2456a6", "sdpa": "#3d4451", "materialised": "#b3562b"},
}
"""A row has the same colour in every figure."""
SCALES = ["#2456a6", "#2a8c82", "#c08a00", "#b3562b", "#a23b72", "#6b7280", "#98a1b0", "#3d4451"]
MUTED = "#98a1b0"
_SPARE = ["#6a51a3", "#7a8b2f", "#d0627c", "#4f93c0", "#8c6d46", "#1b998b", "#e07a1f", "#b08fd8"]
HEIGHT = 380


@dataclass(frozen=True)
class Panel:
    """One picture of a figure."""

    title: str
    figure: go.Figure


def empty_figure(legend: bool = True) -> go.Figure:
    """A figure in the page's style, without traces."""
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


def colored(selected: Sequence[Selected]) -> list[tuple[Selected, str, list[Result], str]]:
    """Every row with its results and its colour."""
    spare = cycle(_SPARE)
    return [
        (part, row, results, COLORS.get(row.removesuffix("-bidirectional")) or next(spare))
        for part in selected
        for row, results in part.rows.items()
    ]
