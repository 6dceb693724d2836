"""What the numbers of a result are called, and how they are written."""

from dataclasses import dataclass, replace
from typing import Any

from maha_attn.experiments.results import Result


@dataclass(frozen=True)
class Metric:
    """A number that a result may hold.

    Attributes:
        label: With the unit.
        digits: Decimals.
        scale: The stored number is divided by it for people.
        by_device: It depends on the device, so it is compared on the same one only.
        unit: Of a difference.
    """

    label: str
    digits: int = 2
    scale: float = 1
    by_device: bool = False
    unit: str = ""

    def text(self, value: float | None) -> str:
        """A number as a cell."""
        return "–" if value is None else f"{value / self.scale:,.{self.digits}f}"


METRICS = {
    "bits_per_byte": Metric("bits per byte", 4, unit="bits per byte"),
    "bits_per_byte_error": Metric("error over books", 4),
    "perplexity": Metric("perplexity"),
    "word_perplexity": Metric("perplexity per word", 1),
    "final_loss": Metric("final training loss", 3),
    "tokens_per_s": Metric("training, 1000 tokens/s", 1, 1e3, by_device=True),
    "peak_bytes": Metric("peak memory, GiB", 2, 2**30),
    "parameters": Metric("parameters, M", 2, 1e6),
    "weight_moved": Metric("weight that moves", 4),
    "attention_flops": Metric("attention, GFLOP", 2, 1e9),
    "layer_flops": Metric("layer, GFLOP", 2, 1e9),
    "executed_pairs": Metric("executed pairs, M", 2, 1e6),
    "visible_pairs": Metric("visible pairs, M", 2, 1e6),
    "accuracy": Metric("accuracy, %", 2, unit="points"),
    "f1": Metric("F1, %", 2, unit="points"),
    "forced_f1": Metric("F1 of answers that exist, %", 2, unit="points"),
    "majority_accuracy": Metric("commonest class, %", 2, unit="points"),
    "exact": Metric("exact match, %", 2, unit="points"),
    "chrf": Metric("chrF", 2),
    "bleu": Metric("BLEU", 2, unit="BLEU"),
    "train_ms": Metric("training, ms a sequence", 3, by_device=True),
    "train_speedup": Metric("times faster than SDPA", 2, by_device=True),
    "train_sequences_per_s": Metric("training, sequences/s", 1, by_device=True),
    "train_peak_bytes": Metric("peak memory of training, MiB", 1, 2**20),
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
    if name == "weight_moved":
        return (result.content.get("fusion") or {}).get("moved")
    return result["metrics"].get(name)
