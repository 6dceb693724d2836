"""Limits for other people's code: so much time for a pass, so much memory on a CPU."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the body takes longer, at the end of the operator that runs then.

    Without effect outside the main thread and where there are no interval timers.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def limited_memory(gib: float | None, device: torch.device) -> Iterator[None]:
    """Let the body's allocations on a CPU fail, rather than the machine, beyond ``gib``.

    None: 80 % of what is available. A GPU needs no such limit, and its driver more addresses.
    """
    if device.type == "cuda" or not os.path.exists("/proc/meminfo"):
        yield
        return
    import resource

    allowed = 0.8 * _kilobytes("/proc/meminfo", "MemAvailable") if gib is None else gib * 2**20
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(1024 * (_kilobytes("/proc/self/status", "VmSize") + allowed))
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _kilobytes(file: str, name: str) -> int:
    with open(file, encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
