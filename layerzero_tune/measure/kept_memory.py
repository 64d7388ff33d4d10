"""Memory that calls of a kernel take and do not give back."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")

# What a kernel may keep beside a copy of each of its inputs: tables, scratch memory, small objects.
KEPT_BYTES = 64 * 1024 * 1024


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h: bytes in use in the heaps and in mappings of their own are `uordblks` and `hblkhd`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    )  # fmt: skip


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if function is not None:
        function.restype = _Mallinfo2
    return function


def allocated_bytes() -> int:
    """Bytes that this process has from the C library's allocator, from where torch has its tensors too; 0 where the
    library does not tell (glibc does from 2.33 on).

    Unlike the process's size it does not count what was freed and is kept for later.
    """
    tell = _mallinfo2()
    if tell is None:
        return 0
    info = tell()
    return int(info.uordblks + info.hblkhd)


class KeptMemory:
    """By candidate, the bytes that its calls have kept. What its load keeps, such as compiled code, is not to be
    counted."""

    def __init__(self, allowed: float) -> None:
        """`allowed` bytes are none of its business; where it is infinite, nothing is counted."""
        self._allowed = allowed
        self._kept: Counter[int] = Counter()

    def count(self, candidate: int, action: Callable[[], Result]) -> Result:
        """Do what the candidate does, and charge it with the memory that is taken afterwards."""
        if math.isinf(self._allowed):
            return action()
        before = allocated_bytes()
        try:
            return action()
        finally:
            self._kept[candidate] += allocated_bytes() - before

    def excess(self, candidate: int) -> str:
        """What is wrong with what the candidate has kept, empty if nothing is."""
        if self._kept[candidate] > self._allowed:
            before = allocated_bytes()
            gc.collect()  # it may be garbage in cycles: while calls are timed, none is collected
            self._kept[candidate] -= before - allocated_bytes()
        kept = self._kept[candidate]
        if kept <= self._allowed:
            return ""
        return f"its calls kept {kept >> 20} MiB, allowed {self._allowed / 2**20:.0f} MiB: it leaks memory"
