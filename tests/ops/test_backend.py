"""Which backend is chosen, and what is said about it."""

import pytest
import torch

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
