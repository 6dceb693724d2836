"""The run folder: everything that a run was made of and made, in files that other tools read.

recipe.yaml       the complete settings
environment.json  command, commit, versions, device
metrics.jsonl     one JSON object a line, appended as training goes
checkpoint-N/     the Trainer's, for --resume
runs/             TensorBoard's, where it is installed
model/            the trained model (safetensors) and its tokenizer, for from_pretrained
evaluation.json   what `maha eval` found
scales.png        how much each scale was used
"""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

_PACKAGES = (
    "maha-attn",
    *("torch", "triton", "transformers", "accelerate", "tokenizers", "datasets", "numpy"),
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The complete settings."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Command, commit, versions, device."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """What training logged."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The trained model and its tokenizer."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """What evaluation found."""
        return self.path / "evaluation.json"

    @property
    def picture(self) -> Path:
        """How much each scale was used."""
        return self.path / "scales.png"

    def settings(self) -> dict[str, Any]:
        """The complete settings as plain values."""
        return yaml.safe_load(self.recipe.read_text())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end: the Trainer's state comes last."""
        complete = [file.parent for file in self.path.glob("checkpoint-*/trainer_state.json")]
        return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def create_run(path: str, settings: dict[str, Any], overwrite: bool = False) -> RunFolder:
    """Make a run folder with its settings and environment.

    Raises:
        ValueError: The folder holds something already, and ``overwrite`` is not given or what it
            holds is no run.
    """
    run = RunFolder(Path(path))
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        if not run.recipe.is_file():
            raise ValueError(
                f"{path} exists and is no run folder (it has no recipe.yaml), so nothing in it is "
                "touched; name another one with --train.output_dir"
            )
        if not overwrite:
            raise ValueError(
                f"run folder {path} is not empty; continue it with --resume, replace it with "
                "--overwrite, or name another one with --train.output_dir"
            )
        shutil.rmtree(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    seed = settings["train"]["seed"]
    run.environment.write_text(json.dumps({**environment(), "seed": seed}, indent=2) + "\n")
    return run


def open_run(path: str) -> RunFolder:
    """Find a run folder that holds a trained model.

    Raises:
        ValueError: The folder does not exist, is no run folder, or its training did not end.
    """
    run = RunFolder(Path(path))
    if not run.recipe.is_file():
        found = "has no recipe.yaml" if run.path.is_dir() else "does not exist"
        raise ValueError(
            f"{path} is no run folder: it {found}; expected a folder that `maha train` made, "
            "for example runs/demo"
        )
    if not (run.model / "model.safetensors").is_file():
        raise ValueError(
            f"run folder {path} has no model/model.safetensors: its training did not end; "
            "finish it with `maha train RECIPE --resume`"
        )
    return run


def resume_run(path: str, settings: dict[str, Any]) -> RunFolder:
    """Find a run folder whose training can be continued with these settings.

    Raises:
        ValueError: There is no checkpoint, or the model or the data are others.
    """
    run = RunFolder(Path(path))
    if not run.recipe.is_file() or run.last_checkpoint() is None:
        raise ValueError(f"{path} holds no checkpoint to resume from; leave --resume out")
    stored = run.settings()
    for section in ("model", "data"):
        before, now = stored[section], settings[section]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"cannot resume {path}: {section}.{name} was {before.get(name)!r} there and "
                    f"is {now.get(name)!r} now; keep it, or start anew with --overwrite"
                )
    return run


def environment() -> dict[str, Any]:
    """What a run depends on beside its settings."""
    cuda = torch.cuda.is_available()
    changes = _git("status", "--porcelain")
    return {
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "device": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    """The installed version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this code runs from; None where it is not in one."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
