"""The kind ``cost``: what an attention costs at every length, beside the fastest full attention."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from maha_attn.bench.cost import main as measure
from maha_attn.bench.cost import parse
from maha_attn.reproduce.job import Clock, Job

REFERENCE = "sdpa"
BY_MACHINE = ("device", "dtype", "rounds", "tokens", "memory", "output")
MEASURED = (
    *("attention_flops", "closed_form_flops", "layer_flops", "visible_pairs"),
    *("forward_peak_bytes", "train_peak_bytes"),
)


def measure_cost(job: Job, clock: Clock) -> dict[str, Any] | None:
    """Run ``maha bench cost`` for one attention in one direction, in turn with `REFERENCE`.

    The settings are the command's options, and ``attention`` and ``direction``. Where the attention
    cannot run, the curves have no value; ``limits`` and ``skipped`` say why.
    """
    name = job.experiment.merged(job.row, job.budget)["attention"]
    clock.show(0, 1, "measuring")
    with TemporaryDirectory() as folder:
        output = Path(folder) / "cost.json"
        with redirect_stdout(StringIO()):  # Its tables; the report has them all in one.
            measure([*_arguments(job), "--output", str(output)])
        document = json.loads(output.read_text(encoding="utf-8"))
    rows = [row for row in document["rows"] if row["attention"] == name]
    reference = [row for row in document["rows"] if row["attention"] == REFERENCE]
    curves: dict[str, list[Any]] = {"length": [row["length"] for row in rows]}
    curves |= {key: [row.get(key) for row in rows] for key in MEASURED}
    for what in ("forward", "train"):
        times = [_per_sequence(row, what) for row in rows]
        curves[f"{what}_ms"] = times
        curves[f"{what}_spread_ms"] = [_per_sequence(row, what, "spread_ms") for row in rows]
        curves[f"{what}_speedup"] = [
            None if own is None or (other := _per_sequence(row, what)) is None else other / own
            for own, row in zip(times, reference, strict=True)
        ]
        curves[f"{what}_sequences_per_s"] = [None if t is None else 1e3 / t for t in times]
    return {
        "settings": {k: v for k, v in document["settings"].items() if k != "output"},
        "data": {"fingerprint": "random tokens"},
        "metrics": {"lengths": len(rows)},
        "curves": curves,
        "limits": rows[0]["limits"],
        "skipped": [row.get("skipped") for row in rows],
    }


def cost_settings(job: Job) -> dict[str, Any]:
    """The command's options, but for those that the recipe leaves to the machine."""
    named = job.experiment.merged(job.row, job.budget)
    return {
        name: value
        for name, value in vars(parse(_arguments(job))).items()
        if name in named or name not in BY_MACHINE
    }


def _arguments(job: Job) -> list[str]:
    """The command's arguments."""
    options = job.experiment.merged(job.row, job.budget)
    name, direction = options.pop("attention"), options.pop("direction", "causal")
    return [
        *(f"--{option}={value}" for option, value in options.items()),
        *("--attentions", ",".join(dict.fromkeys((name, REFERENCE)))),
        *("--directions", direction, "--device", job.device.type, "--seed", str(job.seed)),
    ]


def _per_sequence(row: dict[str, Any], what: str, number: str = "median_ms") -> float | None:
    """Milliseconds for one row of the batch."""
    return row[what][number] / row["batch"] if what in row else None
