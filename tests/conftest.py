"""What every test shares: one thread, no network, and where the data samples are."""

import gzip
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_CACHE = TemporaryDirectory(prefix="maha-attn-tests-")
# Before torch, transformers and datasets are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
# Kernels run in Triton's interpreter where there is no GPU; read when triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

hypothesis.settings.register_profile("maha", deadline=None)
hypothesis.settings.load_profile("maha")

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data samples that are not ours to ship: in $MAHA_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("MAHA_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data samples in {folder}; set MAHA_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def novel() -> str:
    """A book that the package ships."""
    from maha_attn.data.files import find_files

    (file,) = find_files("embedded:alice_in_wonderland")
    return gzip.decompress(file.read_bytes()).decode()


@pytest.fixture(scope="session")
def hub_folder() -> Callable[..., Path]:
    """Write a data set as the hub keeps it: parquet files, declared in the header of its README."""

    def write(folder: Path, configs: dict[str, dict[str, Any]]) -> Path:
        header = ""
        for config, splits in configs.items():
            header += f"- config_name: {config}\n  data_files:\n"
            for split, rows in splits.items():
                path = folder / config / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(path)
                header += f"  - split: {split}\n    path: {config}/{split}-*\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n{header}---\n")
        return folder

    return write


@pytest.fixture(scope="session")
def fetch_source() -> Callable[[str, str], Path]:
    """Returns a file of a package's source distribution; see :func:`_fetch_source`."""
    return _fetch_source


def _fetch_source(requirement: str, member: str) -> Path:
    """A file of the source distribution that ``requirement`` names, at ``member`` in it.

    pip fetches it once into the user's cache; where it cannot, the test is skipped.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maha-attn"
    file = cache / requirement.replace("==", "-") / member
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as scratch:
        # torch depends on setuptools, which is all that building needs.
        options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--retries=0", "-q"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", scratch, requirement]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            pytest.skip(f"cannot fetch the source distribution of {requirement}: {reason}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as content:
            (found,) = (name for name in content.getnames() if name.endswith(f"/{member}"))
            source = content.extractfile(found)
            assert source is not None
            part = Path(scratch) / "part"
            part.write_bytes(source.read())
        part.replace(file)  # whole or not at all
    return file


class Trap:
    """Pickles that leave a trace where they are unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)

    def set(self, file: Path) -> None:
        """Put one in the place of a file."""
        import torch

        torch.save(self, file)
        with file.open("rb") as content:
            torch.load(content, weights_only=False)
        assert self.sprung, "the trap works"
        self.trace.unlink()

    @property
    def sprung(self) -> bool:
        return self.trace.exists()


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    """Sets traps, and tells whether one was sprung."""
    return Trap(tmp_path / "trace")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
