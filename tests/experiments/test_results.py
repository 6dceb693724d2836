"""Result files: whole or not at all, and refused when they do not say how they came about."""

import json
from pathlib import Path
from typing import Any

import pytest

from maha_attn.experiments.results import (
    PROVENANCE,
    RefusedError,
    read_result,
    read_results,
    result_path,
    write_result,
)

CONTENT: dict[str, Any] = {
    **{"experiment": "books", "row": "convex", "budget": "small", "seed": 0},
    **{"command": "maha reproduce", "commit": "abc", "date": "2026-11-24", "device": "a GPU"},
    **{"device_class": "gpu", "versions": {"torch": "2.13"}, "settings": {"a": 1}},
    **{"data": {"fingerprint": "f"}, "metrics": {"perplexity": 2.0}},
}


def place(folder: Path) -> Path:
    return result_path(folder, "books", "small", "convex", 0)


def test_round_trip(tmp_path: Path) -> None:
    write_result(place(tmp_path), CONTENT)
    assert read_result(place(tmp_path)).content == CONTENT
    results, refused = read_results(tmp_path)
    assert [result.run for result in results] == [("books", "small", "convex", 0)]
    assert not refused
    assert list(place(tmp_path).parent.iterdir()) == [place(tmp_path)]


@pytest.mark.parametrize("name", [*PROVENANCE, "data", "budget", "metrics", "device_class"])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_what_lacks_provenance_is_refused(tmp_path: Path, name: str, how: str) -> None:
    content = {**CONTENT, name: None}
    if how == "missing":
        del content[name]
    path = place(tmp_path)
    with pytest.raises(RefusedError, match=f"lacks {name}"):
        write_result(path, content)
    assert not path.exists()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    results, (reason,) = read_results(tmp_path)
    assert not results
    assert reason == f"{path}: lacks {name}"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"metrics": [1]}, r"metrics is no dict: \[1\]"),
        ({"metrics": {"perplexity": "9"}}, r"metrics\.perplexity is no number: '9'"),
        ({"settings": [1]}, "settings is no dict"),
        ({"versions": "2"}, "versions is no dict"),
        ({"seed": "1"}, "seed is no int"),
        ({"seed": True}, "seed is no int"),
        ({"commit": 7}, "commit is no str"),
        ({"data": {"rows": 1}}, r"lacks data\.fingerprint"),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(
    tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    path = place(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**CONTENT, **wrong}))
    with pytest.raises(RefusedError, match=reason):
        read_result(path)


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"metrics\.perplexity is no number: nan"):
        write_result(place(tmp_path), {**CONTENT, "metrics": {"perplexity": float("nan")}})
    with pytest.raises(RefusedError, match="not JSON compliant"):
        write_result(place(tmp_path), {**CONTENT, "curves": {"loss": [float("nan")]}})
    assert not list(tmp_path.rglob("*.json*"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_result(place(tmp_path), CONTENT)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_result(place(tmp_path), {**CONTENT, "command": "another"})
    assert read_result(place(tmp_path))["command"] == "maha reproduce"
    assert list(place(tmp_path).parent.iterdir()) == [place(tmp_path)]


def test_half_and_misplaced_files_are_refused(tmp_path: Path) -> None:
    text = json.dumps(CONTENT)
    for name, content in (("half.json", text[:50]), ("convex-seed9.json", text), ("l.json", "[]")):
        place(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        (place(tmp_path).parent / name).write_text(content)
    results, refused = read_results(tmp_path)
    assert not results
    assert "convex-seed9.json: holds books/small/convex, seed 0" in refused[0]
    assert "half.json: no JSON document" in refused[1]
    assert "l.json: expected an object, got list" in refused[2]
