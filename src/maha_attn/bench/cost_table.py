"""The tables that ``maha bench cost`` prints."""

from typing import Any

Row = dict[str, Any]


def cost_table(rows: list[Row]) -> str:
    """One line an attention; below, those without numbers, and why.

    GFLOP executed, saved against full, by closed form; visible pairs saved; memory of training,
    saved against materialised; what the attention cannot do.
    """
    header = ["attn GFLOP", "saved", "closed", "visible", "layer"]
    header += ["fwd ms", "fwd+bwd", "±", "seq/s", "MiB", "saved"]
    lines = [" " * 16 + "".join(f"{cell:>11}" for cell in header) + "  limits"]
    reasons = []
    for row in rows:
        train = row.get("train", {})
        cells = [
            _number(row.get("attention_flops"), 1e-9),
            _number(row.get("attention_flops_saved"), 100, "%"),
            _number(row.get("closed_form_flops"), 1e-9),
            _number(row.get("visible_pairs_saved"), 100, "%"),
            _number(row.get("layer_flops"), 1e-9),
            _number(row.get("forward", {}).get("median_ms")),
            _number(train.get("median_ms")),
            _number(train.get("spread_ms")),
            _number(row.get("train_sequences_per_s")),
            _number(row.get("train_peak_bytes"), 2**-20),
            _number(row.get("train_peak_bytes_saved"), 100, "%"),
        ]
        if any(cell != "–" for cell in cells):
            line = row["attention"].ljust(16) + "".join(f"{cell:>11}" for cell in cells)
            lines.append(f"{line}  {row['limits']}".rstrip())
        if reason := row.get("skipped") or row.get("not_counted"):
            reasons.append(f"{row['attention']}: {reason[:120]}")
    return "\n".join(lines + reasons)


def growth_table(rows: list[Row]) -> str:
    """One line an attention whose growth was measured."""
    return "\n".join(
        f"{row['attention']:16}{'causal' if row['causal'] else 'bidirectional':14}"
        f"forward {_number(row['forward'])}, forward + backward {_number(row['train'])}"
        for row in rows
        if row["train"] is not None
    )


def _number(value: float | None, factor: float = 1, unit: str = "") -> str:
    return "–" if value is None else f"{factor * value:,.2f}{unit}"
