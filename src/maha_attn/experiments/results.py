"""The file of a run: one JSON document, written whole or not at all, refused when incomplete.

    results/paper/EXPERIMENT/BUDGET/ROW-seedN.json

It holds the provenance of a measurement (command, commit, date, device, versions, settings), which
run it is (experiment, row, seed, budget), the data's fingerprint, ``metrics`` (numbers by name, the
unit in the name where it has one), and what kinds of experiment add: curves; documents, positions,
fusion, attention of language models; scores by test example (``correct``, ``scores``,
``bleu_statistics``) of tasks, ``pretrained``, the run whose weights were fine-tuned, and
``diverged``, the step after which the loss was no number (then nothing was judged).
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("results/paper")
"""Where result files are unless another folder is named."""
PROVENANCE = ("commit", "versions", "device", "settings", "seed")
REQUIRED = (
    *("experiment", "row", "budget", "data", "metrics", "command", "date", "device_class"),
    *PROVENANCE,
)


_KINDS = {
    **dict.fromkeys(("data", "metrics", "versions", "settings"), dict),
    **dict.fromkeys(("experiment", "row", "budget", "commit", "date", "device"), str),
    "seed": int,
}


class RefusedError(ValueError):
    """A result, or a set of results, that must not be reported, and why."""


@dataclass(frozen=True)
class Result:
    """A run's document and where it was read."""

    path: Path
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A field of the document."""
        return self.content[name]

    @property
    def diverged(self) -> int | None:
        """The step after which the loss was no number; None: it was one to the end."""
        return self.content.get("diverged")

    @property
    def run(self) -> tuple[str, str, str, int]:
        """Experiment, budget, row and seed."""
        return self["experiment"], self["budget"], self["row"], self["seed"]


def result_path(folder: Path, experiment: str, budget: str, row: str, seed: int) -> Path:
    """Where the file of a run is."""
    return folder / experiment / budget / f"{row}-seed{seed}.json"


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a document under a temporary name, then give it its own: never half a file.

    Raises:
        RefusedError: It lacks what `read_result` asks for, or a number is not finite.
    """
    _check(content, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with part.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except ValueError as error:
        raise RefusedError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_result(path: Path) -> Result:
    """Read a run's document.

    Raises:
        RefusedError: It is no JSON document, or lacks what a reader needs to trust and repeat it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: no JSON document ({error})") from error
    _check(content, str(path))
    return Result(path, content)


def _check(content: object, where: str) -> None:
    if not isinstance(content, dict):
        raise RefusedError(f"{where}: expected an object, got {type(content).__name__}")
    if missing := [name for name in REQUIRED if content.get(name) in (None, "", {})]:
        raise RefusedError(f"{where}: lacks {', '.join(missing)}")
    for name, kind in _KINDS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise RefusedError(f"{where}: {name} is no {kind.__name__}: {content[name]!r:.40}")
    for name, number in content["metrics"].items():
        if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
            raise RefusedError(f"{where}: metrics.{name} is no number: {number!r:.40}")
    if "fingerprint" not in content["data"]:
        raise RefusedError(f"{where}: lacks data.fingerprint")


def read_results(folder: Path, root: Path | None = None) -> tuple[list[Result], list[str]]:
    """All runs under a folder, and why the others were refused.

    Args:
        folder: Where to look.
        root: The folder of all results, where that is another one.
    """
    root = root or folder
    results, refused = [], []
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith("."):
            continue
        try:
            result = read_result(path)
            experiment, budget, row, seed = result.run
            if path != result_path(root, experiment, budget, row, seed):
                raise RefusedError(f"{path}: holds {experiment}/{budget}/{row}, seed {seed}")
        except RefusedError as error:
            refused.append(str(error))
        else:
            results.append(result)
    return results, refused


def distinct(results: Iterable[Result], name: str) -> list[str]:
    """The different values of a field, in order of appearance."""
    return list(dict.fromkeys(str(result[name]) for result in results))
