"""Reading and splitting text: nothing is lost, and a bad file is told by its name."""

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maha_attn.data.text import embedded_names, read_text, split_text


def test_embedded_novels_are_the_shared_ones(shared_data: Path, checkout: Path) -> None:
    for name in embedded_names():
        file = f"{name.removeprefix('embedded:')}.txt.gz"
        assert (
            read_text(name)
            == gzip.decompress((shared_data / "embedded" / file).read_bytes()).decode()
        )


def test_provenance_lists_every_novel_with_its_hash(checkout: Path) -> None:
    folder = checkout / "src" / "maha_attn" / "data" / "embedded"
    provenance = (folder / "README.md").read_text()
    novels = sorted(folder.glob("*.gz"))
    assert len(novels) == 3
    for novel in novels:
        assert hashlib.sha256(novel.read_bytes()).hexdigest() in provenance


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", ".txt", "is empty"),
        (b" \n\n", ".txt", "is empty"),
        (gzip.compress(b"", mtime=0), ".txt.gz", "is empty"),
        ("café".encode("latin1"), ".txt", "is not UTF-8: byte 3 is 0xe9; convert it"),
        (b"plain", ".txt.gz", "is no whole gzip file"),
        (gzip.compress(b"some text" * 99, mtime=0)[:-9], ".txt.gz", "is no whole gzip file"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, suffix: str, message: str) -> None:
    file = tmp_path / f"book{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_text(str(file))
    assert str(file) in str(error.value)


def test_missing_file_and_unknown_novel(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt.*does not exist.*embedded:hard_times"):
        read_text(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="no novel 'embedded:moby_dick'; there are embedded:alice"):
        read_text("embedded:moby_dick")


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
