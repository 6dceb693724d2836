"""The run folder: everything that a run was made of and made, in files that other tools read.

recipe.yaml       the complete settings
environment.json  command, commit, versions, device
metrics.jsonl     one JSON object a line, appended as training goes
checkpoint-N/     for --resume: model and tokenizer as in model/, training_state.safetensors,
                  trainer_state.json, and manifest.json with sizes and hashes
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

from maha_attn.training.checkpoint import belongs_to, checkpoints, replace_text
from maha_attn.training.distributed import num_processes
from maha_attn.training.identity import check_same_run, identify_settings

_PACKAGES = (
    "maha-attn",
    *("torch", "triton", "transformers", "accelerate", "tokenizers", "datasets", "numpy"),
    *("scikit-learn", "sacrebleu"),
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
        """The complete settings as plain values.

        Raises:
            ValueError: Its recipe is damaged.
        """
        try:
            settings = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.recipe} is damaged: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{self.recipe} is damaged: it holds no settings")
        return settings

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return (checkpoints(self.path) or [None])[-1]


def create_run(path: str, settings: dict[str, Any], overwrite: bool = False) -> RunFolder:
    """Make a run folder with its settings and environment.

    Raises:
        ValueError: The folder holds something already, and ``overwrite`` is not given or what it
            holds is no run.
    """
    run = RunFolder(Path(path))
    if run.path.exists() and (not run.path.is_dir() or _holds_files(run.path)):
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
        _empty(run)
    run.path.mkdir(parents=True, exist_ok=True)
    _describe(run, settings)
    return run


def _empty(run: RunFolder) -> None:
    """Remove everything; what makes it a run folder goes last, so that a kill leaves it one."""
    for path in run.path.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != run.recipe:
            path.unlink()
    run.recipe.unlink()


def _holds_files(folder: Path) -> bool:
    """Whether there is anything in a folder but what a killed process left half written."""
    return any(path.suffix != ".partial" for path in folder.iterdir())


def _describe(run: RunFolder, settings: dict[str, Any]) -> None:
    """Write the settings, which make a folder a run folder, and where the run was started."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    replace_text(run.recipe, text)
    if not run.environment.exists():
        record = {**environment(), "seed": settings["train"]["seed"]}
        replace_text(run.environment, json.dumps(record, indent=2) + "\n")


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
        refuse_pickle(run.model)
        raise ValueError(
            f"run folder {path} has no model/model.safetensors: its training did not end; "
            "finish it with `maha train RECIPE --resume`"
        )
    return run


def refuse_pickle(folder: Path) -> None:
    """Say why weights that are there all the same are not read.

    Raises:
        ValueError: The folder holds weights as PyTorch pickles them.
    """
    if (file := folder / "pytorch_model.bin").is_file():
        raise ValueError(
            f"{file} is pickled, and unpickling it may run any code, so it is not read; if you "
            "trust it, load it yourself and save_pretrained the model (model.safetensors)"
        )


def resume_run(path: str, settings: dict[str, Any]) -> RunFolder:
    """Find a run folder whose training can be continued with these settings, and note them there.

    Raises:
        ValueError: It is no run folder.
        RunError: Its newest checkpoint belongs to a run with other settings, or says not which.
    """
    run = RunFolder(Path(path))
    if not run.recipe.is_file():
        raise ValueError(f"{path} is no run folder to resume from; leave --resume out")
    if checkpoint := run.last_checkpoint():
        check_same_run(checkpoint, belongs_to(checkpoint), identify_settings(settings))
    _describe(run, settings)
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
        "processes": num_processes(),
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
