"""Examples from the hub and from local files, by one way: ``datasets.load_dataset``.

Everything that a user can get wrong in the data is found here, before training starts, and told
with the file, the row and the field.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from datasets import Dataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity
from pyarrow import ArrowInvalid, Scalar
from tqdm.auto import tqdm

from maha_attn.data.defects import malformed_json, undecodable
from maha_attn.data.files import find_files, find_folder

Names = str | list[str]

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".json", ".jsonl"), ("json", {})),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_DOCUMENT = ("text", {"sample_by": "document"})
"""What has none of these endings is a text file: one document, in the column ``text``."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Where examples are: splits of a dataset of the hub, or files.

    Args:
        dataset: Name on the hub (nyu-mll/glue), or a local folder in the hub's own layout. Left
            out, the next ones name files: .jsonl, .json, .csv, .tsv, .parquet, each row an example,
            or text, each file an example with the column text; .gz too. Files are looked for here,
            then in the folder of data samples ($MAHA_DATA).
        config: Configuration of that dataset (sst2).
        revision: Its branch or commit; refs/convert/parquet for one that consists of a script.
        train: Split (train, train[:10%]) or files to learn from.
        validation: Split or files to be judged by.
        test: Split or files to be judged by in addition, once, after training.
        limit: Take the first so many examples of every part.
        num_proc: Processes that tokenise.
    """

    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    train: Names
    validation: Names | None = None
    test: Names | None = None
    limit: int | None = None
    num_proc: int = 1

    def __post_init__(self) -> None:
        """Check what types do not say."""
        if not self.train:
            raise ValueError("data.train must name at least one split or file, got none")
        for name in ("limit", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Part:
    """The examples of one part, and how a user finds each of them.

    Args:
        name: train, validation or test.
        rows: Its examples; users count them from 1.
        sources: Which file or split the rows came from, and how many of them.
        columns: The columns of ``rows`` → those of the data, where they are called otherwise.
    """

    name: str
    rows: Dataset
    sources: list[tuple[str, int]]
    columns: dict[str, str] = field(default_factory=dict)

    def where(self, row: int) -> str:
        """The row as a user finds it: ``sst2/train.jsonl, row 17``; a header is no row."""
        for source, num_rows in self.sources:
            if row < num_rows:
                return f"{source}, row {row + 1}"
            row -= num_rows
        raise IndexError(row)

    def refuse(self, row: int, field: str, message: str) -> NoReturn:
        """Tell what is wrong with a field of a row."""
        raise ValueError(f"{self.where(row)}, field {self.columns.get(field, field)!r}: {message}")

    def first(self, field: str, wrong: Callable[[Any], bool]) -> tuple[int, Any] | None:
        """The first row whose field is ``wrong``, and what it holds; None: there is no such row."""
        values = (
            value
            for batch in self.rows.select_columns([field]).iter(batch_size=1000)
            for value in batch[field]  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
        checked = tqdm(values, f"Checking {self.name}", len(self.rows), delay=2)
        return next(((row, value) for row, value in enumerate(checked) if wrong(value)), None)

    def require_text(self, *names: str) -> None:
        """Refuse a field that does not hold text in every row."""
        for name in names:
            found = self.first(name, lambda value: not isinstance(value, str) or not value.strip())
            if found:
                row, value = found
                empty = "is empty; expected text"
                self.refuse(
                    row, name, empty if isinstance(value, str) else f"expected text, got {value!r}"
                )

    def require_utf8(self) -> None:
        """Refuse bytes that are no text, which Arrow takes from some files as they come."""
        for name in self.rows.column_names:
            column = self.rows.data.column(name)
            try:
                column.validate(full=True)
            except ArrowInvalid as error:
                row = next((i for i, value in enumerate(column) if _undecodable(value)), 0)
                self.refuse(row, name, f"expected UTF-8, got other bytes ({error})")


def _undecodable(value: Scalar) -> bool:
    """Whether a value of an Arrow column holds text that is not UTF-8."""
    try:
        value.as_py()
    except UnicodeDecodeError:
        return True
    return False


def load_parts(settings: SourceSettings, columns: dict[str, str]) -> dict[str, Part]:
    """Load the parts that there are: train, and validation and test if the settings name them."""
    loaded = [load_part(settings, name, columns) for name in ("train", "validation", "test")]
    return {part.name: part for part in loaded if part is not None}


def load_part(settings: SourceSettings, part: str, columns: dict[str, str]) -> Part | None:
    """Load one part and give its columns the names that a task knows.

    Args:
        settings: Where the examples are.
        part: ``train``, ``validation`` or ``test``.
        columns: The task's names → the columns of the data; ``a.b`` is field b of column a.

    Returns:
        The rows, with ``columns``' keys only; None: the settings name no such part.

    Raises:
        ValueError: A file or dataset is missing or cannot be read, a column is not there, or text
            is not UTF-8.
    """
    names = getattr(settings, part)
    if not names:
        return None
    names = [names] if isinstance(names, str) else names
    verbosity = get_verbosity()
    set_verbosity(CRITICAL)  # It logs the defects that are told here.
    try:
        if settings.dataset is None:
            pieces = [piece for name in names for piece in _load_files(name)]
        else:
            pieces = [_load_split(settings, part, name) for name in names]
    finally:
        set_verbosity(verbosity)
    renamed = [(source, _take(rows, columns, f"{source} (data.{part})")) for source, rows in pieces]
    try:
        rows = concatenate_datasets([rows for _, rows in renamed])
    except ValueError as error:
        raise ValueError(
            f"the columns of {', '.join(names)} (data.{part}) do not agree: {error}"
        ) from None
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, len(rows))))
    loaded = Part(part, rows, [(source, len(piece)) for source, piece in renamed], columns)
    loaded.require_utf8()
    return loaded


def _load_files(name: str) -> list[tuple[str, Dataset]]:
    """The rows of each file of this name, and what to call the file."""
    paths = find_files(name)
    named = [(name if len(paths) == 1 else str(path), path) for path in paths]
    return [(source, _load_file(source, path)) for source, path in named]


def _load_file(source: str, path: Path) -> Dataset:
    """The rows of a file."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    builder, options = _FORMATS.get(suffix, _DOCUMENT)
    if builder != "parquet" and (defect := undecodable(path)):
        raise ValueError(f"data file {source!r} {defect}")
    rows: Any = []
    if path.stat().st_size > 0:
        try:
            rows = load_dataset(builder, data_files=str(path), split="train", **options)
        except StopIteration:  # The JSON builder's, where there is no row.
            pass
        except Exception as error:  # The builders raise whatever their parsers do.
            if "corresponds to no data" not in str(error):  # of a header alone
                reason = _reason(builder, path, error.__cause__ or error)
                raise ValueError(
                    f"data file {source!r} cannot be read as {builder}: {reason}"
                ) from None
    if not len(rows):
        raise ValueError(f"data file {source!r} is empty; expected examples to learn from")
    return rows


def _reason(builder: str, path: Path, error: BaseException) -> str:
    """What a parser found wrong, with the place as a user finds it.

    pyarrow counts a JSON file's rows from 0 in each block of it; pandas most of a CSV file's lines
    from 1, some from 0.
    """
    message = str(error).strip()
    if builder == "json":
        return malformed_json(path) or re.sub(r" in row \d+", "", message)
    return re.sub(r"\brow (\d+)", lambda row: f"line {int(row[1]) + 1}", message)


def _load_split(settings: SourceSettings, part: str, split: str) -> tuple[str, Dataset]:
    """The rows of a split of a dataset."""
    assert settings.dataset is not None
    path = str(find_folder(settings.dataset) or settings.dataset)
    try:
        rows = load_dataset(path, settings.config, split=split, revision=settings.revision)
    except DatasetGenerationError as error:  # A file of it is not what it seems.
        raise ValueError(
            f"dataset {settings.dataset!r}, split {split!r} (data.{part}) cannot be read: "
            f"{error.__cause__ or error}"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"dataset {settings.dataset!r}, split {split!r} (data.{part}): {error}; expected a "
            "dataset that the hub has and that can be reached, or a local folder in its layout"
        ) from None
    return f"{settings.dataset} {split}", cast(Dataset, rows)


def _take(rows: Dataset, columns: dict[str, str], source: str) -> Dataset:
    """The columns of a task, under the task's names."""
    rows = rows.flatten()
    for column in columns.values():
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has no column {column!r} (data.columns names them); it has "
                f"{', '.join(rows.column_names)}"
            )
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"data.columns must name different columns, got {columns}")
    rows = rows.select_columns(list(columns.values()))
    for column, kind in rows.features.items():
        if kind == Value("large_string"):  # of a CSV file; JSON's and the hub's are strings
            rows = rows.cast_column(column, Value("string"))
    return rows.rename_columns({c: n for n, c in columns.items() if c != n})
