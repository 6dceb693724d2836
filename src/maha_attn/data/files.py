"""Where data files are: as named, among the data samples, or a novel of the package."""

import os
from glob import glob
from importlib.resources import files
from pathlib import Path

EMBEDDED = "embedded:"
"""What a file's name starts with where it means a novel of the package (data/embedded)."""
SAMPLES = "MAHA_DATA"
"""The environment variable that names the folder of data samples."""


def embedded_names() -> list[str]:
    """The novels that :func:`find_files` knows: ``embedded:hard_times``, …."""
    folder = Path(str(files("maha_attn.data"))) / "embedded"
    return sorted(EMBEDDED + path.name.removesuffix(".txt.gz") for path in folder.glob("*.txt.gz"))


def find_files(name: str) -> list[Path]:
    """The files that a name in a recipe means.

    Args:
        name: ``embedded:NAME``, or a path, which may have wildcards (``books/train-*.jsonl.gz``).
            A relative one is looked for here, then in the folder of data samples: ``$MAHA_DATA``,
            or ``shared/data`` beside the checkout.

    Raises:
        ValueError: There is no such file.
    """
    if name.startswith(EMBEDDED):
        if name not in embedded_names():
            raise ValueError(f"no novel {name!r}; there are {', '.join(embedded_names())}")
        folder = Path(str(files("maha_attn.data"))) / "embedded"
        return [folder / f"{name.removeprefix(EMBEDDED)}.txt.gz"]
    for folder in _folders():
        if found := sorted(Path(path) for path in glob(str(folder / name)) if Path(path).is_file()):
            return found
    raise ValueError(
        f"data file {name!r} does not exist (looked in {' and '.join(map(str, _folders()))}); give "
        f"the path of a file, set {SAMPLES} to the folder of data samples, or for text take one of "
        f"{', '.join(embedded_names())}"
    )


def find_folder(name: str) -> Path | None:
    """The folder of this name, looked for where :func:`find_files` looks; None: there is none."""
    return next((folder / name for folder in _folders() if (folder / name).is_dir()), None)


def _folders() -> list[Path]:
    """Where relative paths start from."""
    checkout = Path(str(files("maha_attn"))).parents[1]
    return [Path.cwd(), Path(os.environ.get(SAMPLES, checkout.parent / "shared" / "data"))]


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
