"""Reading text files, and the novels that come with the package."""

import gzip
from importlib.resources import files
from pathlib import Path

EMBEDDED = "embedded:"
"""What a file's name starts with where it means a novel of the package (data/embedded)."""


def embedded_names() -> list[str]:
    """The names that :func:`read_text` knows without a file: ``embedded:hard_times``, …."""
    folder = files("maha_attn.data") / "embedded"
    found = (entry.name for entry in folder.iterdir() if entry.name.endswith(".txt.gz"))
    return sorted(EMBEDDED + name.removesuffix(".txt.gz") for name in found)


def read_text(name: str) -> str:
    """Read one document.

    Args:
        name: The path of a UTF-8 text file, gzip-compressed if it ends in ``.gz``, or
            ``embedded:NAME`` for a novel of the package.

    Raises:
        ValueError: The file does not exist, is empty or is not UTF-8 text.
    """
    if name.startswith(EMBEDDED):
        if name not in embedded_names():
            raise ValueError(f"no novel {name!r}; there are {', '.join(embedded_names())}")
        source = files("maha_attn.data") / "embedded" / f"{name.removeprefix(EMBEDDED)}.txt.gz"
    else:
        source = Path(name)
        if not source.is_file():
            raise ValueError(
                f"text file {name!r} does not exist (looked in {Path.cwd()}); give the path of a "
                f"UTF-8 text file, or one of {', '.join(embedded_names())}"
            )
    content = source.read_bytes()
    try:
        text = (gzip.decompress(content) if source.name.endswith(".gz") else content).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {name!r} is not UTF-8: byte {error.start} is {content_byte(error)}; "
            f"convert it first, for example: iconv -f latin1 -t utf-8 {name}"
        ) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"text file {name!r} is no whole gzip file: {error}") from None
    if not text.strip():
        raise ValueError(f"text file {name!r} is empty; expected text to learn from")
    return text


def content_byte(error: UnicodeDecodeError) -> str:
    """The byte that could not be decoded, as a reader of hex dumps knows it."""
    return f"0x{error.object[error.start]:02x}"


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """Cut the last part off a document, at the end of a line where there is one.

    Args:
        text: The document.
        held_out: The part to hold out, in characters, between 0 and 1.

    Returns:
        The beginning and the held-out end; together they are ``text``.
    """
    target = round(len(text) * (1 - held_out))
    cut = text.rfind("\n", 0, target) + 1 or target
    return text[:cut], text[cut:]
