"""Small data sets, in every form in which they may come."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

Rows = list[dict[str, Any]]
Write = Callable[[str, Rows], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows to a file of the test's folder in the format of its name; returns its path."""

    def write(name: str, rows: Rows) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffixes = path.suffixes
        if suffixes[-1] == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif suffixes[0] in (".csv", ".tsv"):
            with path.open("w", newline="") as file:
                delimiter = "," if suffixes[0] == ".csv" else "\t"
                writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(rows)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if suffixes[-1] == ".gz" else text)
        return str(path)

    return write
