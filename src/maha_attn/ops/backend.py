"""Choice between composed PyTorch operators and kernels.

Kernels need a CUDA device of compute capability 8.0 or more, bf16, fp16 or fp32, and a head width
that is a multiple of 8 and at most 256; an operation may have limits of its own, which it names as
``limit``. What they cannot do, PyTorch does, unless ``backend="triton"`` asks for them: said once
for each reason where a GPU could have run a kernel, and not at all on a CPU, which nobody expects
to. What has no kernel for any options (projections, gating, chunks that continue a cache) is
PyTorch's whatever the backend.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

MAX_WIDTH = 256
"""Widest head of the kernels: a tile of it still fits into shared memory."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_said: set[str] = set()


def use_triton(
    backend: str, *tensors: Tensor, width: int | None = None, limit: str | None = None
) -> bool:
    """Whether kernels serve these tensors.

    Args:
        backend: ``auto``, ``torch`` or ``triton``.
        tensors: All floating-point inputs of the operation.
        width: Head width, where the operation has one.
        limit: Why the operation's kernel cannot serve its options; None where it can.

    Warns:
        UserWarning: ``auto`` falls back on a GPU, once for each reason.

    Raises:
        ValueError: ``backend`` has no such value, or is ``triton`` where kernels cannot run.
    """
    if backend == "torch":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    reason = unsupported(*tensors, width=width) or limit
    if reason is None:
        # The interpreter stands in for a GPU only where it is asked for.
        return backend == "triton" or tensors[0].is_cuda
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'torch'")
    if tensors[0].is_cuda:
        _say(reason)
    return False


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"PyTorch operators run, not kernels: {reason}", stacklevel=4)


# A compiler says it while it traces, and goes on: torch.compiler.assume_constant_result, which
# would import the compiler, and triton with it, for this mark alone.
_say._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def unsupported(*tensors: Tensor, width: int | None = None) -> str | None:
    """Why kernels cannot serve these tensors; None where they can."""
    device = tensors[0].device
    if any(t.device != device for t in tensors):
        return f"inputs lie on several devices: {', '.join(str(t.device) for t in tensors)}"
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor} of {device} is below 8.0"
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {device.type} is not cuda"
    for t in tensors:
        if t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"dtype {t.dtype} is not bfloat16, float16 or float32"
    if width is not None and (width % 8 or width > MAX_WIDTH):
        return f"head width {width} is not a multiple of 8 up to {MAX_WIDTH}"
    return None


def is_watched(arguments: Iterable[Any] = ()) -> bool:
    """Whether somebody wants to know of every operation.

    A compiler or tracer, a dispatch mode (which counts or fakes), a function transform, or a
    subclass of tensors among the ``arguments``: then nothing goes past the dispatcher, and nothing
    is kept for later.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active():
        return True
    plain = (Tensor, nn.Parameter)
    return any(isinstance(t, Tensor) and type(t) not in plain for t in arguments)
