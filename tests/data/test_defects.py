"""What is wrong with data files: no text, or no JSON, and where."""

import gzip
import io
import re
import zipfile
from pathlib import Path

import pytest

from maha_attn.data.defects import malformed_json, undecodable


def _xlsx() -> bytes:
    """A zip archive, as office files are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", "<worksheet/>")
    return content.getvalue()


XLSX = _xlsx()


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("a\ncafé".encode("latin1"), ".txt", r"is not UTF-8: byte 4 of line 2 is 0xe9; convert"),
        (gzip.compress("é".encode("latin1")), ".txt.gz", "is not UTF-8: byte 1 of line 1"),
        ("été".encode("utf-16"), ".txt", r"is not UTF-8: .*iconv -f utf-16"),
        (XLSX, ".xlsx", r"is no text: line 1 is binary; expected text \(\.txt .*\.parquet"),
        (gzip.compress(XLSX), ".xlsx.gz", "is no text"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ".pdf", "is no text"),
        (b"plain", ".txt.gz", "is no whole gzip file"),
        (gzip.compress(b"some text" * 99)[:-9], ".txt.gz", "is no whole gzip file"),
        ("café".encode(), ".txt", None),
        (gzip.compress("café".encode()), ".txt.gz", None),
    ],
    ids=[
        "latin1",
        "latin1.gz",
        "utf16",
        "xlsx",
        "xlsx.gz",
        "pdf",
        "not gzip",
        "cut gzip",
        "good",
        "good.gz",
    ],
)
def test_undecodable(tmp_path: Path, content: bytes, suffix: str, message: str | None) -> None:
    file = tmp_path / f"book{suffix}"
    file.write_bytes(content)
    found = undecodable(file)
    if message is None:
        assert found is None
    else:
        assert re.match(message, found or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": 1}\n{"a": 2 "b": 3}\n',
            "what begins in line 2 is no JSON: Expecting ',' delimiter (line 2, column 9)",
        ),
        (
            '{"a": 1}\n\n\nhello\n',
            "what begins in line 4 is no JSON: Expecting value (line 4, column 1)",
        ),
        ('{"a": 1}\n{"a":\n{"a": 2}\n', "what begins in line 2 is no JSON: Expecting ',' del"),
        ('{"a": 1}\n[1, 2]\n', "line 2: expected an object, got [1, 2]"),
        ('{\n "a": 1,\n}\n', "what begins in line 1 is no JSON: Expecting property name"),
        (
            '[{"a": 1},\n {"a" 2}]\n',
            "what begins in line 1 is no JSON: Expecting ':' delimiter (line 2,",
        ),
        ('\ufeff{"a": 1}\n\n{"a": "a\tb"}\n', None),
        ('[{"a": 1},\n {"a": 2}]\n', None),
        ('{\n "a": 1\n}\n', None),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, message: str | None) -> None:
    for name, encode in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(encode(content.encode()))
        found = malformed_json(tmp_path / name)
        assert found is None if message is None else (found or "").startswith(message)
