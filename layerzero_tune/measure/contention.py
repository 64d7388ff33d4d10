"""Contention: processor time that other processes took while a sample was measured."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from layerzero_runtime.devices.cpu import usable_processors
from layerzero_tune.measure.process_tree import processes_below

# Kernels that run on every core wait for the slowest of their threads: a neighbour that takes a twentieth of the
# machine can cost them many times that.
MAX_SHARE = 0.05
# What the host does for a GPU's calls runs on one core, and that a run measures on several GPUs at once is no
# disturbance while there are cores enough: up to this share of them for all of its processes together. On a virtual
# machine with 16 cores of a Xeon and an H100 (torch 2.11, 2026-11-26) three busy neighbours made short eager calls 2%
# slower and moved their ratios by at most 0.9%, seven made them 9 to 13% slower (3.8%), eight 51 to 64% (7.1%).
FREE_SHARE = 0.25
# A disturbed contest is timed again this often at most; where the neighbour stays, the last attempt is kept.
MAX_ATTEMPTS = 3
_STAT = "/proc/stat"


@dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds since boot, of all that runs on the processors that this process may use, of this process and
    of the other processes of its run; the wall clock; and how many those processors are."""

    busy_s: float | None
    own_s: float
    wall_s: float
    siblings_s: float = 0.0
    processors: int = 1

    @classmethod
    def now(cls, run: int | None = None) -> Self:
        """`run` is the process whose descendants, and itself, make up this process's run; without it nobody does."""
        siblings_s = 0.0 if run is None else _siblings_s(run)
        busy_s, processors = _busy()
        return cls(busy_s, time.process_time(), time.perf_counter(), siblings_s, processors)


def others_share(start: ProcessorTime, end: ProcessorTime) -> float:
    """The share of the processors' time that went to others between two moments, 0 where it cannot be known. Of the
    run's own processes that counts which goes beyond `FREE_SHARE`.

    The system counts in ticks of 10 ms, so the moments should lie a tenth of a second apart or more.
    """
    if start.busy_s is None or end.busy_s is None or end.wall_s <= start.wall_s:
        return 0.0
    offered = (end.wall_s - start.wall_s) * end.processors
    own, siblings = end.own_s - start.own_s, max(0.0, end.siblings_s - start.siblings_s)
    free = min(siblings, max(0.0, FREE_SHARE * offered - own))
    return max(0.0, end.busy_s - start.busy_s - own - free) / offered


def _busy() -> tuple[float | None, int]:
    """Seconds that the processors of this process were busy or stolen by the hypervisor, and how many they are:
    proc(5), /proc/stat. What others do on processors that this process is kept off (taskset, a container's cpuset)
    takes nothing from it. All of the machine's where the file does not list them by their numbers."""
    try:
        with open(_STAT, encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None, 1
    whole, *single = lines
    names = _own_names()
    own = [fields for fields in single if fields[0] in names]
    if not own or len(own) < len(names):
        return _busy_ticks(whole) / _ticks_per_s(), max(1, len(single))
    return sum(map(_busy_ticks, own)) / _ticks_per_s(), len(own)


def _busy_ticks(fields: list[str]) -> int:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return user + nice + system + irq + softirq + steal


@cache
def _own_names() -> frozenset[str]:
    """What /proc/stat calls the processors that this process could use when it was first asked: kernels' libraries may
    tie its threads to some of them later."""
    return frozenset(f"cpu{number}" for number in usable_processors() or ())


def _siblings_s(run: int) -> float:
    """Seconds of a process and all below it but this one; also of those that have ended, once they are waited for:
    proc(5), /proc/PID/stat. 0 where the system does not tell."""
    own, ticks = os.getpid(), 0
    for process in (run, *processes_below(run)):
        with suppress(OSError):  # it has ended
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
            user, system, waited_user, waited_system = map(int, fields[11:15])
            ticks += waited_user + waited_system + (0 if process == own else user + system)
    return ticks / _ticks_per_s()


def _ticks_per_s() -> float:
    return float(os.sysconf("SC_CLK_TCK"))
