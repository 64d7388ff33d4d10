"""The C library's allocator as it is in a server that has run for a while: memory that it once had stays with it.

Left to itself, glibc gives large blocks back to the system, or the top of its heap once that is long enough, depending
on what the process allocated before. A kernel then pays for fresh pages at every call in one process and never in
another: one norm took 0.4, 0.7 and 2.4 ms in six processes of one machine. Servers see it settle, because the limits
follow the largest block that was ever freed (mallopt(3), M_MMAP_THRESHOLD), or run another allocator that keeps memory.
"""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h. Values are ints: no block is mapped apart, nothing is given back (-1 is the largest size), and the heap
# grows by so much at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 1024 * 1024


# Share of the memory that is available when the worker starts: the rest is the tuner's and other processes'.
_USABLE_SHARE = 0.8
# What kernels may keep over all contests (compiled code, and too little to be noticed in one of them) before a fresh
# process measures the next: memory runs out later, if ever, and heaps of equal size are alike.
_KEPT_BYTES = 1024 * 1024 * 1024
# Beside GPUs the heap is no part of what is timed, and libraries keep more: in runs on an H100 a fresh worker came
# every ten contests or so, and most of what they call preparation were its imports (2026-11-26). There they may keep
# so much of the available memory, all workers of a host together.
_KEPT_SHARE_BESIDE_GPUS = 0.25


def limit_memory() -> None:
    """Have allocations fail where they would take more memory than the machine has available now.

    What a kernel asks for too much is then refused to it, as an error that is recorded; without a limit, Linux lets it
    have pages until it kills some process. Where the system does not say how much there is, nothing changes.
    """
    if sys.platform != "linux":
        return
    import resource

    available = available_bytes()
    held = _kilobytes("/proc/self/status", "VmData")  # what the limit counts
    if available is None or held is None:
        return
    limit = 1024 * held + int(_USABLE_SHARE * available)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def kept_limit(gpus: int) -> int:
    """How many bytes a worker's heap may grow by over its contests, on a host with so many GPUs to measure on (0: it
    measures on the CPU)."""
    available = available_bytes()
    if gpus == 0 or available is None:
        return _KEPT_BYTES
    return max(_KEPT_BYTES, int(_KEPT_SHARE_BESIDE_GPUS * available / gpus))


def available_bytes() -> int | None:
    """Memory that new work can have without swapping (proc(5), MemAvailable); None where the system does not say."""
    if sys.platform != "linux":
        return None
    kilobytes = _kilobytes("/proc/meminfo", "MemAvailable")
    return None if kilobytes is None else 1024 * kilobytes


def _kilobytes(path: str, name: str) -> int | None:
    """The figure of this name in a file of lines such as "MemAvailable:  20123456 kB"."""
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return None


def retain_memory() -> bool:
    """Have this process keep all memory that it frees; call it before anything large is allocated.

    Returns whether the C library takes such settings (glibc does); elsewhere nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES), (_M_MMAP_MAX, 0))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
