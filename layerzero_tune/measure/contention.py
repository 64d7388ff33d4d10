"""Contention: processor time that other processes took while a sample was measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Self

# Kernels that run on every core wait for the slowest of their threads: a neighbour that takes a twentieth of the
# machine can cost them many times that.
MAX_SHARE = 0.05
# A disturbed contest is timed again this often at most; where the neighbour stays, the last attempt is kept.
MAX_ATTEMPTS = 3
_STAT = "/proc/stat"


@dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds since boot: of the whole machine, of this process, and the wall clock."""

    machine_s: float | None
    own_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Self:
        return cls(_machine_busy_s(), time.process_time(), time.perf_counter())


def others_share(start: ProcessorTime, end: ProcessorTime) -> float:
    """The share of the machine's processor time that went to others between two moments, 0 where it cannot be known.

    The machine counts in ticks of 10 ms, so the moments should lie a tenth of a second apart or more.
    """
    if start.machine_s is None or end.machine_s is None or end.wall_s <= start.wall_s:
        return 0.0
    others = (end.machine_s - start.machine_s) - (end.own_s - start.own_s)
    return max(0.0, others) / ((end.wall_s - start.wall_s) * (os.cpu_count() or 1))


def _machine_busy_s() -> float | None:
    """Seconds that all processors were busy or stolen by the hypervisor: proc(5), first line of /proc/stat."""
    try:
        with open(_STAT, encoding="ascii") as file:
            fields = file.readline().split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / float(os.sysconf("SC_CLK_TCK"))
