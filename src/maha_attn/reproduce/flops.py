"""The kind ``flops``: what attention costs in query-key pairs and FLOPs at every length."""

from dataclasses import asdict
from typing import Any

from maha_attn.bench.flops import attention_cost
from maha_attn.reproduce.job import Clock, Job
from maha_attn.spec import AttentionSpec


def count_flops(job: Job, clock: Clock) -> dict[str, Any] | None:
    """Count on the ``meta`` device, so every budget and device gives the same numbers.

    The settings are those of `AttentionSpec`, and ``lengths``.
    """
    spec, lengths = _options(job)
    costs = []
    for done, length in enumerate(lengths):
        clock.show(done, len(lengths), f"{length:,} tokens")
        if clock.is_up:
            return None
        costs.append(asdict(attention_cost(spec, length)))
    curves = {name: [cost[name] for cost in costs] for name in costs[0]}
    return {
        "settings": flops_settings(job),
        "data": {"fingerprint": "none", "about": "shapes only"},
        "metrics": {f"{name}_at_{lengths[-1]}": values[-1] for name, values in curves.items()},
        "curves": curves,
    }


def flops_settings(job: Job) -> dict[str, Any]:
    """The layer's options and the lengths."""
    spec, lengths = _options(job)
    return {**asdict(spec), "lengths": lengths}


def _options(job: Job) -> tuple[AttentionSpec, list[int]]:
    options = job.experiment.merged(job.row, job.budget)
    lengths = options.pop("lengths")
    return AttentionSpec(**options), lengths
