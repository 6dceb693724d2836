"""What is wrong with a data file, told so that a user finds the place; all counts are from 1."""

import codecs
import gzip
import json
import re
from pathlib import Path
from typing import IO

from tqdm.auto import tqdm

FORMATS = (
    "text (.txt or any other ending, a document a file), or rows in .jsonl, .json, .csv or .tsv, "
    "each also as .gz, or in .parquet"
)
"""What is read."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANKS = re.compile(r"\s*")


def undecodable(path: Path) -> str | None:
    """What is wrong with the bytes of a text file, gzip-compressed if it ends in ``.gz``.

    Returns:
        The defect and what to do, or None: it is UTF-8 text.
    """
    number, line = 0, b""
    try:
        with _open(path) as file:
            lines = tqdm(file, f"Checking {path.name}", unit=" lines", delay=2)
            for number, line in enumerate(lines, 1):
                is_binary = b"\0" in line or line.startswith(b"%PDF-")
                if is_binary and not line.startswith(_UTF16):
                    return f"is no text: line {number} is binary; expected {FORMATS}"
                line.decode()
    except (gzip.BadGzipFile, EOFError) as error:
        return f"is no whole gzip file: {error}"
    except UnicodeDecodeError as error:
        encoding = "utf-16" if line.startswith(_UTF16) else "latin1"
        return (
            f"is not UTF-8: byte {error.start + 1} of line {number} is "
            f"0x{error.object[error.start]:02x}; convert it first, for example: "
            f"iconv -f {encoding} -t utf-8 {path.name}"
        )
    return None


def malformed_json(path: Path) -> str | None:
    """Where a file is neither JSON objects, as a rule one a line, nor one list.

    Returns:
        The defect and its line, or None: it is JSON.
    """
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    decoder, start = json.JSONDecoder(strict=False), _skip_blanks(text, 0)
    try:
        while start < len(text):
            row, end = decoder.raw_decode(text, start)
            if not isinstance(row, dict if start else dict | list):
                return f"line {_line(text, start)}: expected an object, got {row!r:.40}"
            start = _skip_blanks(text, end)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        return f"what begins in line {_line(text, start)} is no JSON: {error.msg} ({place})"
    return None


def _skip_blanks(text: str, start: int) -> int:
    """Where the next character is that is none."""
    blanks = _BLANKS.match(text, start)
    assert blanks
    return blanks.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, or of what it compresses."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]
