"""What the numbers of a result are called, how they are written, and what makes them uncertain."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from maha_attn.experiments.results import Result


@dataclass(frozen=True)
class Metric:
    """A number that a result may hold.

    Attributes:
        label: With the unit.
        digits: Decimals.
        scale: The stored number is divided by it for people.
        unit: Of a difference.
        by_device: It depends on the device and the code, so it is compared on the same ones only.
        exact: It is counted, and comes out the same in every run.
        sample: What its test part is a sample of; empty: it has none.
        error: The metric that holds its standard error over the sample.
    """

    label: str
    digits: int = 2
    scale: float = 1
    unit: str = ""
    by_device: bool = False
    exact: bool = False
    sample: str = ""
    error: str = ""

    def text(self, value: float | None) -> str:
        """A number as a cell."""
        return "–" if value is None else f"{value / self.scale:,.{self.digits}f}"


METRICS = {
    "bits_per_byte": Metric(
        "bits per byte", 4, unit="bits per byte", error="bits_per_byte_error", sample="books"
    ),
    "perplexity": Metric("perplexity", error="perplexity_error", sample="books"),
    "word_perplexity": Metric("perplexity per word", 1, sample="books"),
    "token_accuracy": Metric("next token right, %", unit="points", sample="books"),
    "final_loss": Metric("final training loss", 3, unit="nats"),
    "tokens_per_s": Metric("training, 1000 tokens/s", 1, 1e3, by_device=True),
    "sequences_per_s": Metric("training, sequences/s", 1, by_device=True),
    "peak_bytes": Metric("peak memory, GiB", 2, 2**30, exact=True),
    "parameters": Metric("parameters, M", 2, 1e6, exact=True),
    "feed_forward": Metric("feed-forward width", 0, exact=True),
    "weight_moved": Metric("weight that moves", 3, sample="windows"),
    "weight_moved_untrained": Metric("… before training", 3, sample="windows"),
    "weight_moved_gain": Metric(
        "weight that moves beyond its untrained value", 3, sample="windows"
    ),
    "least_moving_head": Metric("… of the stillest head", 3),
    "most_moving_head": Metric("… of the liveliest head", 3),
    "static_cost": Metric("lost with weights held still", 4, unit="bits per byte", sample="books"),
    "attention_flops": Metric("attention, GFLOP", 2, 1e9, exact=True),
    "layer_flops": Metric("layer, GFLOP", 1, 1e9, exact=True),
    "executed_pairs": Metric("executed pairs, M", 2, 1e6, exact=True),
    "visible_pairs": Metric("visible pairs, M", 2, 1e6, exact=True),
    "accuracy": Metric("accuracy, %", sample="sentences", unit="points"),
    "majority_accuracy": Metric("commonest class, %", unit="points"),
    "f1": Metric("F1, %", sample="test rows", unit="points"),
    "forced_f1": Metric("F1 of answers that exist, %", sample="questions", unit="points"),
    "exact": Metric("exact match, %", sample="questions", unit="points"),
    "chrf": Metric("chrF", sample="sentences"),
    "bleu": Metric("BLEU", unit="BLEU", sample="sentences"),
    "train_ms": Metric("training, ms a sequence", 3, by_device=True),
    "train_speedup": Metric("times faster than SDPA", by_device=True),
    "train_sequences_per_s": Metric("training, sequences/s", 1, by_device=True),
    "train_peak_bytes": Metric("peak memory of training, MiB", 1, 2**20, exact=True),
}


def metric(column: str) -> Metric:
    """The metric of a column such as ``perplexity`` or ``attention_flops@4096``.

    Raises:
        ValueError: There is none of this name.
    """
    name, _, length = column.partition("@")
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    known = METRICS[name]
    if not length:
        return known
    label = f"{known.label}, {int(length):,} tokens"
    return replace(known, label=label)


def value(result: Result, column: str) -> float | None:
    """A result's number; None where it has none."""
    name, _, length = column.partition("@")
    if length:
        curves: dict[str, Any] = result.content.get("curves", {})
        lengths = curves.get("length", [])
        return curves[name][lengths.index(int(length))] if int(length) in lengths else None
    if name in _DERIVED:
        return _DERIVED[name](result)
    return result["metrics"].get(name)


def _moved(result: Result) -> float | None:
    """As a share of the weight: None in files that did not divide by weights of another sum."""
    fusion = result.content.get("fusion") or {}
    if "moved_untrained" not in fusion:
        heads = (head for layer in fusion.get("layers", []) for head in layer["mean"])
        if any(abs(sum(head) - 1) > 0.01 for head in heads):
            return None
    return fusion.get("moved")


def _untrained(result: Result) -> float | None:
    return (result.content.get("fusion") or {}).get("moved_untrained")


def _gain(result: Result) -> float | None:
    moved, untrained = _moved(result), _untrained(result)
    return None if moved is None or untrained is None else moved - untrained


def _head(choose: Callable[..., float]) -> Callable[[Result], float | None]:
    def find(result: Result) -> float | None:
        heads = (result.content.get("fusion") or {}).get("moved_by_head")
        return choose(chain.from_iterable(heads)) if heads else None

    return find


def _static_cost(result: Result) -> float | None:
    static = result["metrics"].get("static_bits_per_byte")
    return None if static is None else static - result["metrics"]["bits_per_byte"]


def _feed_forward(result: Result) -> float | None:
    return result["settings"].get("model", {}).get("intermediate_size")


_DERIVED: dict[str, Callable[[Result], float | None]] = {
    "feed_forward": _feed_forward,
    "weight_moved": _moved,
    "weight_moved_untrained": _untrained,
    "weight_moved_gain": _gain,
    "least_moving_head": _head(min),
    "most_moving_head": _head(max),
    "static_cost": _static_cost,
}
