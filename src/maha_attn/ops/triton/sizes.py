"""Sizes, in plain Python: triton's functions for them cost the host 5 µs a call."""


def cdiv(a: int, b: int) -> int:
    """``⌈a/b⌉``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``, ``n ≥ 1``."""
    return 1 << (n - 1).bit_length()
