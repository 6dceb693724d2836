"""Nested state (of optimizers, schedules, random generators) in one file without pickle.

Tensors are stored by safetensors under their dotted path; what holds them is JSON in the file's
metadata. Numbers come back bit for bit; tuples come back as lists.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_TENSOR = "tensor:"
_TREE = "tree"  # one key: safetensors writes several in an order that changes


def save_state(state: dict[str, Any], file: Path) -> None:
    """Write a tree of dictionaries with string keys, lists, tensors, numbers, strings and None.

    Raises:
        TypeError: It holds something else.
    """
    tensors: dict[str, Tensor] = {}
    tree = {part: _encode(value, part, tensors) for part, value in state.items()}
    save_file(tensors, file, metadata={_TREE: json.dumps(tree)})


def load_state(file: Path, part: str) -> Any:
    """Read what stood under the key ``part`` of the state; tensors are on the CPU."""
    with safe_open(file, framework="pt") as content:
        return _decode(json.loads(content.metadata()[_TREE])[part], content)


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The node as JSON can hold it; its tensors go to ``tensors``."""
    if isinstance(node, Tensor):
        tensors[path] = node.detach().cpu().contiguous()
        return _TENSOR + path
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return {key: _encode(value, f"{path}.{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_encode(value, f"{path}.{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float):
        return node
    if isinstance(node, str) and not node.startswith(_TENSOR):
        return node
    raise TypeError(f"{path}: a checkpoint cannot hold {type(node).__name__} {node!r}")


def _decode(node: Any, content: Any) -> Any:
    """The reverse of :func:`_encode`."""
    if isinstance(node, str) and node.startswith(_TENSOR):
        return content.get_tensor(node.removeprefix(_TENSOR))
    if isinstance(node, dict):
        return {key: _decode(value, content) for key, value in node.items()}
    if isinstance(node, list):
        return [_decode(value, content) for value in node]
    return node
