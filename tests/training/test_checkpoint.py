"""Folders that are whole or not there, manifests, and state without pickle."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maha_attn.training import checkpoint as disk
from maha_attn.training.checkpoint import RunError, appearing, verify, write_manifest
from maha_attn.training.state_file import load_state, save_state


def make(folder: Path, text: str = "some text") -> Path:
    with appearing(folder) as hidden:
        (hidden / "inner").mkdir()
        (hidden / "inner" / "a.txt").write_text(text)
        (hidden / "b.txt").write_text(text)
        write_manifest(hidden, {"window": 8})
    return folder


def fail_halfway(folder: Path) -> None:
    with appearing(folder) as hidden:
        (hidden / "a.txt").touch()
        assert not folder.exists()
        raise RuntimeError("oops")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(RuntimeError, match="oops"):
        fail_halfway(folder)
    assert list(tmp_path.iterdir()) == []
    make(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify(folder) == {"window": 8}


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    with pytest.raises(OSError, match="full"), appearing(folder):
        raise OSError(errno.ENOSPC, "full")
    verify(folder)
    make(folder, "other text")
    assert (folder / "b.txt").read_text() == "other text"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_everything_is_synchronised_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    synchronise, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        synchronise(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    make(tmp_path / "checkpoint-1")
    before, after = order[:-2], order[-2:]
    hidden = ".checkpoint-1.partial"
    assert sorted(before) == sorted([hidden, "inner", "a.txt", "b.txt", "manifest.json"])
    assert after == ["rename to checkpoint-1", tmp_path.name]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "b.txt").write_text("some"), "b.txt has 4 bytes instead of 9; delete it"),
        (lambda c: (c / "b.txt").write_text("same size"), "b.txt is damaged"),
        (lambda c: (c / "inner" / "a.txt").unlink(), "inner/a.txt is missing"),
        (lambda c: (c / "optimizer.pt").touch(), "optimizer.pt does not belong to it"),
        (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda c: (c / "manifest.json").write_text("{"), "its manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text("[1]"), "its manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "checkpoint-9")
    newest = make(tmp_path / "checkpoint-10")
    damage(newest)
    with pytest.raises(RunError, match=reason) as caught:
        verify(newest)
    assert "delete it to resume from checkpoint-9" in str(caught.value)
    verify(tmp_path / "checkpoint-9")


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        make(tmp_path / f"checkpoint-{step}")
    disk.prune(tmp_path, keep=None, protected=None)
    assert len(disk.checkpoints(tmp_path)) == 4
    disk.prune(tmp_path, keep=1, protected=tmp_path / "checkpoint-4")
    assert [path.name for path in disk.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-12"]


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-1")
    for name in (".checkpoint-2.partial", ".checkpoint-0.discarded"):
        (tmp_path / name).mkdir()
    (tmp_path / ".metrics.jsonl.partial").touch()
    disk.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    make(tmp_path / "checkpoint-6")
    message = r"no space left .* checkpoint-6 is complete.*--resume"
    with pytest.raises(RunError, match=message), disk.full_disk_explained(tmp_path):
        raise RuntimeError("while saving") from error
    with pytest.raises(ZeroDivisionError), disk.full_disk_explained(tmp_path):
        raise ZeroDivisionError


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "optimizer": {
            "state": {
                "a.weight": {"exp_avg": torch.randn(3, 2).bfloat16(), "step": torch.tensor(3.0)}
            },
            "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "fused": None, "nan": 1e-320}],
        },
        "scheduler": {"last_epoch": 3, "lambdas": [None, {}]},
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    save_state(state, tmp_path / "state.safetensors")
    optimizer = load_state(tmp_path / "state.safetensors", "optimizer")
    for name, tensor in state["optimizer"]["state"]["a.weight"].items():
        assert torch.equal(optimizer["state"]["a.weight"][name], tensor)
        assert optimizer["state"]["a.weight"][name].dtype == tensor.dtype
    (group,) = optimizer["param_groups"]
    assert group == {**state["optimizer"]["param_groups"][0], "betas": [0.9, 0.95]}
    assert load_state(tmp_path / "state.safetensors", "scheduler") == state["scheduler"]
    assert torch.equal(load_state(tmp_path / "state.safetensors", "bytes"), state["bytes"])


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}, "tensor:trick"])
def test_state_holds_nothing_else(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"part.*a checkpoint cannot hold"):
        save_state({"part": value}, tmp_path / "state.safetensors")


def test_a_text_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    disk.replace_text(file, json.dumps({"step": 1}))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        disk.replace_text(file, "new")
    assert file.read_text() == '{"step": 1}'
