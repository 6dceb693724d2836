"""Finding data files; the novels of the package."""

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maha_attn.data.files import embedded_names, find_files, split_text


def test_novels_are_those_of_the_collection(shared_data: Path) -> None:
    for name in embedded_names():
        (found,) = find_files(name)
        expected = shared_data / "embedded" / f"{name.removeprefix('embedded:')}.txt.gz"
        assert gzip.decompress(found.read_bytes()) == gzip.decompress(expected.read_bytes())


def test_provenance_lists_every_novel_with_its_hash(checkout: Path) -> None:
    folder = checkout / "src" / "maha_attn" / "data" / "embedded"
    provenance = (folder / "README.md").read_text()
    novels = sorted(folder.glob("*.gz"))
    assert len(novels) == 3
    for novel in novels:
        assert hashlib.sha256(novel.read_bytes()).hexdigest() in provenance


def test_here_comes_before_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, here = tmp_path / "samples", tmp_path / "here"
    for folder in (samples, here):
        folder.mkdir()
        (folder / "both.txt").touch()
    (samples / "b-1.txt").touch()
    (samples / "b-0.txt").touch()
    monkeypatch.setenv("MAHA_DATA", str(samples))
    monkeypatch.chdir(here)
    assert find_files("both.txt") == [here / "both.txt"]
    assert find_files("b-*.txt") == [samples / "b-0.txt", samples / "b-1.txt"]
    with pytest.raises(ValueError, match=rf"'no\.txt' does not exist \(looked in .*{samples}\)"):
        find_files("no.txt")


def test_unknown_novel() -> None:
    with pytest.raises(ValueError, match="no novel 'embedded:moby_dick'; there are embedded:alice"):
        find_files("embedded:moby_dick")


@given(st.text(st.sampled_from("ab \n"), min_size=1), st.floats(0.01, 0.99))
def test_split_loses_nothing_and_cuts_at_a_line(text: str, held_out: float) -> None:
    train, rest = split_text(text, held_out)
    assert train + rest == text
    target = round(len(text) * (1 - held_out))
    if "\n" in text[:target]:
        assert train.endswith("\n")
        assert "\n" not in text[len(train) : target]
    else:
        assert len(train) == target
