"""What is installed: the extras, the wheel, and what an import costs."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from itertools import chain
from pathlib import Path

import pytest

HEAVY = ("transformers", "matplotlib", "jsonargparse", "datasets", "tokenizers", "triton", "scipy")


@pytest.mark.parametrize(
    "module", ["maha_attn", "maha_attn.ops.qp", "maha_attn.layers.attention", "maha_attn.cli"]
)
def test_import_needs_torch_alone(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_missing_extra_is_named(checkout: Path) -> None:
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "from maha_attn.cli import main; main(['train', 'recipes/demo.yaml'])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].endswith("pip install 'maha-attn[train]'")


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=;]", line)[0].lower().replace("_", "-") for line in requirements}


def _direct_dependencies(checkout: Path) -> set[str]:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    return _names([*project["dependencies"], *chain(*project["optional-dependencies"].values())])


def _third_party_imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"maha_attn"}


def test_extras_cover_every_import(checkout: Path) -> None:
    brought = {  # by transformers, datasets, and jsonargparse[signatures]
        *("numpy", "huggingface-hub", "safetensors", "tqdm"),
        "pyarrow",
        *("yaml", "docstring-parser"),
    }
    gpu_only = {"triton", "flash-attn", "fla"}
    imported = set().union(*map(_third_party_imports, (checkout / "src").rglob("*.py")))
    names = {name.replace("_", "-").replace("sklearn", "scikit-learn") for name in imported}
    assert names <= _direct_dependencies(checkout) | brought | gpu_only
    bare = [line for line in requires("maha-attn") or [] if "extra ==" not in line]
    assert _names(bare) == {"torch"}


def test_constraints_pin_every_direct_dependency(checkout: Path) -> None:
    lines = (checkout / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    direct = _direct_dependencies(checkout)
    chosen = {"lm-eval"}  # an extra that nothing else installs: it brings forty packages
    assert direct - {"maha-attn"} - chosen <= {name.lower().replace("_", "-") for name in pins}
    assert pins["torch"] == "2.13.0"


@pytest.mark.slow
def test_wheel_holds_novels_recipes_and_marker(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = checkout / "src" / "maha_attn"
    for folder, prefix in ((source, "maha_attn"), (checkout / "recipes", "maha_attn/recipes")):
        files = [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        assert {f"{prefix}/{file.relative_to(folder)}" for file in files} <= names
    assert f"{wheel.name.rsplit('-', 3)[0]}.dist-info/licenses/LICENSE" in names
