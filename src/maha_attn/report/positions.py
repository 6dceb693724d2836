"""Loss by position in the context, and each row's difference from full attention there."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maha_attn.experiments.results import Result
from maha_attn.report.metrics import Metric
from maha_attn.report.selection import Selected
from maha_attn.report.style import MUTED, Panel, colored, empty_figure
from maha_attn.report.tables import Table
from maha_attn.report.uncertainty import Estimate, combine, resamples
from maha_attn.report.verdicts import signed

REFERENCE = "full"
BITS = Metric("bits per token", 3, sample="books")


@dataclass(frozen=True)
class Bin:
    """Tokens with ``low`` to ``high - 1`` tokens before them in their window.

    Attributes:
        loss: Mean, in bits per token.
        difference: Of it from full attention's, on the same books; None: there is none.
    """

    low: int
    high: int
    loss: float
    difference: Estimate | None

    @property
    def label(self) -> str:
        """The range."""
        last = self.high - 1
        return f"{self.low:,}" if last == self.low else f"{self.low:,}–{last:,}"


def position_bins(results: Sequence[Result], reference: Sequence[Result] | None) -> list[Bin]:
    """The bins of a row's results, but for those that have none."""
    having = [result for result in results if result.content.get("positions")]
    others = [result for result in reference or () if result.content.get("positions")]
    pairs = [(a, b) for a in having for b in others if a["seed"] == b["seed"]]
    bins = []
    for index, entry in enumerate(having[0]["positions"] if having else []):
        losses = [_loss(result, index) for result in having]
        found = None
        if pairs and reference is not results:
            values = [_loss(a, index) - _loss(b, index) for a, b in pairs]
            found = combine(BITS, values, _books_error(pairs, index))
        bins.append(Bin(entry["from"], entry["to"], statistics.fmean(losses), found))
    return bins


def _loss(result: Result, index: int) -> float:
    return result["positions"][index]["nll"] / math.log(2)


def _books_error(pairs: Sequence[tuple[Result, Result]], index: int) -> tuple[float, int] | None:
    """Standard error of a bin's difference by bootstrap over books; None in files without them."""
    sides = []
    for side in zip(*pairs, strict=True):
        documents = [result["documents"] for result in side]
        if not all("positions" in document for seed in documents for document in seed):
            return None
        entries = [[document["positions"][index] for document in seed] for seed in documents]
        sides.append(np.array(entries, dtype=float))  # [seeds, books, (nll, tokens)]
    size = sides[0].shape[1]
    if size < 2:
        return None
    losses = []
    for side in sides:
        sums = resamples(size) @ side  # [seeds, resamples, 2]
        with np.errstate(invalid="ignore"):  # A resample may have no token in the bin.
            losses.append((sums[..., 0] / sums[..., 1]).mean(0))
    return float(np.nanstd(losses[0] - losses[1], ddof=1) / math.log(2)), size - 1


def by_position(selected: Sequence[Selected], options: dict[str, Any]) -> list[Panel]:
    """Loss against the number of tokens before the predicted one, and differences from full."""
    losses, differences, farthest = empty_figure(), empty_figure(), 1
    values: list[float] = []
    for part, row, results, color in colored(selected):
        bins = position_bins(results, part.rows.get(REFERENCE))
        if not bins:
            continue
        farthest = max(farthest, bins[-1].high)
        fixed = {
            "x": [math.sqrt(b.low * b.high) for b in bins],
            "customdata": [b.label for b in bins],
            "hovertemplate": "%{customdata} tokens before: %{y:.3f}",
            "name": part.experiment.rows[row].label,
            "mode": "lines+markers",
            "line": {"color": color},
        }
        losses.add_scatter(y=[b.loss for b in bins], **fixed)
        found = [b.difference for b in bins if b.difference]
        if found:
            halves = [e.half or 0.0 for e in found]
            bars = {"array": halves, "thickness": 1, "width": 3} if any(halves) else None
            differences.add_scatter(y=[e.value for e in found], error_y=bars, **fixed)
            values += [e.value for e in found]
    if not losses.data:
        return []
    panels = [Panel("Loss by position in the context", losses)]
    if differences.data:
        differences.add_hline(y=0, line={"color": MUTED, "dash": "dash", "width": 1})
        room = 0.5 * (max(values) - min(values)) + 0.01  # Bars may reach far beyond.
        differences.update_yaxes(range=[min(values) - room, max(values) + room])
        panels.append(Panel("Difference from full attention (below 0: better)", differences))
    for panel in panels:
        powers = [10**k for k in range(5) if 10**k <= farthest]
        ticks = {"tickvals": powers, "ticktext": [f"{power:,}" for power in powers]}
        panel.figure.update_xaxes(type="log", title="tokens before the predicted one", **ticks)
        panel.figure.update_yaxes(title="bits per token, held-out books")
    return panels


def position_table(selected: Sequence[Selected]) -> Table | None:
    """Full attention's loss in each bin and the other rows' differences from it."""
    for part in selected:
        reference = part.rows.get(REFERENCE)
        rows = {
            part.experiment.rows[row].label: bins
            for row, results in part.rows.items()
            if row != REFERENCE and (bins := position_bins(results, reference))
        }
        full = position_bins(reference, None) if reference else []
        if not full or not rows:
            continue
        cells = [
            [b.label, f"{b.loss:.3f}", *(_signed(bins[i].difference) for bins in rows.values())]
            for i, b in enumerate(full)
        ]
        columns = ["tokens before", part.experiment.rows[REFERENCE].label]
        caption = "Loss by position and its difference from full attention's, bits per token"
        notes = [
            "±: half the 95 % interval, over seeds and books. Below 0: better than full.",
            *_lacking(rows),
        ]
        return Table(caption, [*columns, *rows], cells, notes)
    return None


def _lacking(rows: dict[str, list[Bin]]) -> list[str]:
    """Which sources of variance the intervals of which rows leave out."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for label, bins in rows.items():
        if missing := next((b.difference.missing for b in bins if b.difference), ()):
            lacking.setdefault(missing, []).append(label)
    return [
        f"The intervals lack {' and '.join(missing)} (one seed, or files without sums by book): "
        f"{', '.join(labels)}."
        for missing, labels in lacking.items()
    ]


def _signed(found: Estimate | None) -> str:
    return signed(found, BITS) if found else "–"
