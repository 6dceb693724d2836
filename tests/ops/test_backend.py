"""Which backend is chosen, and what is said about it."""

import pytest
import torch

from maha_attn.ops import backend
from maha_attn.ops.backend import unsupported, use_triton

CPU = torch.zeros(1)


def test_torch_is_always_possible():
    assert not use_triton("torch", CPU.double(), width=3)


def test_auto_is_silent_on_a_cpu():
    assert not use_triton("auto", CPU)
    assert not use_triton("auto", CPU.double(), width=7)


def test_triton_on_a_cpu_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run: "):
        use_triton("triton", CPU)


def test_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="must be 'auto', 'torch' or 'triton', got 'cuda'"):
        use_triton("cuda", CPU)


def test_reasons_name_dtype_and_width(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unsupported(CPU, CPU.half(), width=40) is None
    assert unsupported(CPU.double()) == "dtype torch.float64 is not bfloat16, float16 or float32"
    assert unsupported(CPU, width=36) == "head width 36 is not a multiple of 8 up to 256"
    assert use_triton("triton", CPU, width=64)


class Placed:
    """What `use_triton` looks at of a tensor, on a device that need not exist."""

    def __init__(self, device="cuda:0", dtype=torch.bfloat16):
        self.device, self.dtype = torch.device(device), dtype
        self.is_cuda = self.device.type == "cuda"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 and a process that has said nothing yet."""
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


REASONS = [
    ([Placed(), Placed("cuda:1")], {}, "inputs lie on several devices: cuda:0, cuda:1"),
    ([Placed(dtype=torch.float64)], {}, "dtype torch.float64 is not bfloat16"),
    ([Placed()], {"width": 36}, "head width 36 is not a multiple of 8"),
    ([Placed()], {"limit": "this option has no kernel"}, "this option has no kernel"),
]


@pytest.mark.parametrize(("tensors", "options", "reason"), REASONS)
def test_a_gpu_that_kernels_leave_is_told_once(gpu, tensors, options, reason):
    with pytest.warns(UserWarning, match=f"PyTorch operators run, not kernels: {reason}"):
        assert not use_triton("auto", *tensors, **options)
    assert not use_triton("auto", *tensors, **options)  # A second warning would be an error.
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: {reason}"):
        use_triton("triton", *tensors, **options)


def test_every_reason_is_told(gpu):
    for _ in range(2):
        assert use_triton("auto", Placed(), width=64)
    for tensors, options, reason in REASONS:
        with pytest.warns(UserWarning, match=reason):
            use_triton("auto", *tensors, **options)


def test_an_old_gpu_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 7\.5 of cuda:0 is below 8\.0"):
        assert not use_triton("auto", Placed())
    assert not use_triton("auto", Placed())


def test_a_missing_triton_is_told(gpu, monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.warns(UserWarning, match=r"triton is not installed \(pip install triton\)"):
        assert not use_triton("auto", Placed())
    with pytest.raises(ValueError, match="triton is not installed"):
        use_triton("triton", Placed())


def test_a_compiled_graph_is_told_without_a_break(gpu):
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        backend._say("this option has no kernel")
        return x + 1

    with pytest.warns(UserWarning, match="this option has no kernel"):
        compiled(CPU)
    compiled(CPU)
