"""Checkpoints on disk: whole or not there, and checked before they are used.

A folder is filled under a hidden name, synchronised with the disk, and renamed: what is called
``checkpoint-N`` is complete, at whatever moment the process was killed or the power failed. Its
``manifest.json`` holds the size and SHA-256 of each file, and what the checkpoint belongs to.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class RunError(Exception):
    """What stops a run though the code is sound: told to the user in one line."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    named = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.rpartition("-")[2]))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Fill a folder that appears under its name with everything in it, or not at all.

    Yields:
        The hidden folder to write into. An error removes it and leaves what ``target`` was.
    """
    hidden = target.with_name(f".{target.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            _synchronise(path)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    discard(target)
    hidden.rename(target)
    _synchronise(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder; it is gone at once under its name, however long its files take."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.discarded")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def clear_leftovers(run: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for suffix in ("partial", "discarded"):
        for path in run.glob(f".*.{suffix}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_text(file: Path, text: str) -> None:
    """Write a file that holds the old text or the new, never a part of either."""
    hidden = file.with_name(f".{file.name}.partial")
    hidden.write_text(text, encoding="utf-8")
    _synchronise(hidden)
    hidden.replace(file)
    _synchronise(file.parent)


def prune(run: Path, keep: int | None, protected: Path | None) -> None:
    """Discard all but the newest ``keep`` checkpoints (None: keep all) and ``protected``."""
    if keep:
        for checkpoint in checkpoints(run)[:-keep]:
            if checkpoint != protected:
                discard(checkpoint)


def write_manifest(folder: Path, belongs_to: dict[str, Any]) -> None:
    """Describe the files in ``folder`` and what they belong to."""
    files = {name: _describe(path) for name, path in _files(folder).items()}
    manifest = {"belongs_to": belongs_to, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(checkpoint: Path) -> dict[str, Any]:
    """Compare every file with the manifest.

    Returns:
        What the checkpoint belongs to, as given to :func:`write_manifest`.

    Raises:
        RunError: A file is missing, was added, or differs.
    """
    if reason := _damage(_manifest(checkpoint)["files"], _files(checkpoint)):
        raise _refusal(checkpoint, reason)
    return belongs_to(checkpoint)


def belongs_to(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint belongs to; its other files are not looked at.

    Raises:
        RunError: The manifest is missing or damaged.
    """
    return _manifest(checkpoint)["belongs_to"]


def _damage(listed: dict[str, Any], found: dict[str, Path]) -> str | None:
    """How the files of a checkpoint differ from those that its manifest lists."""
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong to it ({MANIFEST} does not list it)"
        size, expected = found[name].stat().st_size, listed[name]["bytes"]
        if size != expected:
            return f"{name} has {size} bytes instead of {expected}"
    for name, path in found.items():
        if _describe(path) != listed[name]:
            return f"{name} is damaged (its SHA-256 is not the one in {MANIFEST})"
    return None


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if all(isinstance(manifest[part], dict) for part in ("belongs_to", "files")):
            return manifest
    except FileNotFoundError as error:
        reason = f"it has no {MANIFEST}, so it is not one that `maha train` completed"
        raise _refusal(checkpoint, reason) from error
    except (ValueError, KeyError, TypeError):
        pass
    raise _refusal(checkpoint, f"its {MANIFEST} is damaged")


def _refusal(checkpoint: Path, reason: str) -> RunError:
    """Why a checkpoint is not used, and what to do."""
    older = [path.name for path in checkpoints(checkpoint.parent) if path != checkpoint]
    way_out = f"delete it to resume from {older[-1]}" if older else "start anew with --overwrite"
    return RunError(f"cannot resume from {checkpoint}: {reason}; {way_out}")


def _files(folder: Path) -> dict[str, Path]:
    """All files in and below a folder but its manifest."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(path.relative_to(folder)): path for path in paths if path != folder / MANIFEST}


def _describe(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _synchronise(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_explained(run: Path) -> Iterator[None]:
    """Turn a full disk, whichever library met it, into one message.

    Raises:
        RunError: A write found no space. Complete checkpoints are untouched.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        kept = checkpoints(run)
        state = f"{kept[-1].name} is complete" if kept else "there is no checkpoint yet"
        raise RunError(
            f"no space left on the disk of {run} ({shutil.disk_usage(run).free:,} bytes free); "
            f"training stopped and {state}: free some space and go on with --resume"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says so; Rust libraries say it in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if f"os error {errno.ENOSPC}" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
