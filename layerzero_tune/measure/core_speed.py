"""How fast the core is that makes a GPU's calls: what an eager call costs is often the host's part of it.

On virtual machines with an H100 and 16 hardware threads of a Xeon such calls had two states, for 10 ms or for seconds
(torch 2.11, 2026-11-26 to 28; no counter of the system told): torch's RMSNorm took 10 to 12 us or 16 to 18, its
attention 20 or 32, FlashAttention-4 15 or 24, in about half of the contests the one and in half the other. What the GPU
bounds takes the same time in both, so that ratios were of one state or of the other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from layerzero_tune.measure.failures import Result
from layerzero_tune.measure.full_speed import FullSpeed, Patience
from layerzero_tune.measure.processor_speed import ProcessorSpeed, additions

# In ns: calls that take longer are bound by the GPU. The host's part is below 150 us for all libraries that are called.
HOST_BOUND_NS = 200_000.0
# The loop takes 0.2 ms: it is looked at behind each sample, of some ms.
_CALLS, _BLOCKS = 20, 5


class CoreSpeed(ProcessorSpeed):
    """The time of a small serial loop, against its best of all cores that this thread may use.

    While the speed is missing the thread moves from one of them to the next: who shares one of them with it, on this
    machine or beside it, does not share all.

    Attributes:
        patience: how long a contest waits for the speed.
    """

    is_of_processors = False
    look_s = 0.002
    # In the slow state calls take half as long again, which is a third of the speed; what a core's clock gains while
    # others rest is less than this.
    max_loss = 0.2

    def __init__(self, measure: Callable[[], float], now: Callable[[], float] = monotonic) -> None:
        super().__init__(measure, now)
        self.patience = Patience()
        cores = _usable_cores()
        self._next_core = itertools.cycle(cores)
        for _ in cores:
            self.pause()
            self.lost()

    def pause(self) -> None:
        """Move, and let the core get up to its speed: one that was idle is slow for a moment."""
        _move(next(self._next_core))
        until = self._now() + self.look_s
        while self._now() < until:
            self._measure()


class CoreWatch:
    """Takes the samples of one contest on a core at full speed.

    Attributes:
        lost: as of `FullSpeed`, of the parts of the contest that were kept.
        seen_ns: the loop's time behind each sample of these parts.
    """

    def __init__(self, speed: CoreSpeed, waiting: Callable[[], None]) -> None:
        self.lost = 0.0
        self.seen_ns: list[float] = []
        self._of_part_ns: list[float] = []
        self._speed = speed
        self._full_speed = FullSpeed(speed, waiting, speed.patience)

    @property
    def waited_s(self) -> float:
        """As of `FullSpeed`."""
        return self._full_speed.waited_s

    def take(self, call_ns: float, sample: Callable[[], float | None]) -> float | None:
        """What the sample gives, of calls that take about so long, taken again while a core that decides is slow; None
        where it failed."""
        if call_ns > HOST_BOUND_NS:
            return sample()
        found = self._full_speed.take(sample)
        if found is not None:
            self._of_part_ns.append(self._speed.last)
        return found

    def part(self, part: Callable[[], Result]) -> Callable[[], Result]:
        """A part that can be taken again: of what it takes the last time counts, once that is kept."""

        def begun() -> Result:
            self._full_speed.lost = 0.0
            self._of_part_ns.clear()
            return part()

        return begun

    def keep_part(self) -> None:
        """What the part took the last time is kept."""
        self.lost = max(self.lost, self._full_speed.lost)
        self.seen_ns += self._of_part_ns


def serial_loop() -> Callable[[], float]:
    """A loop on one core; the function gives the time of a call in ns."""
    return additions(1, _CALLS, _BLOCKS)


def _usable_cores() -> tuple[int | None, ...]:
    """In ascending order from one that depends on the process: those that measure on several GPUs do not move in step.
    Where the system cannot tell them there is one, without a number."""
    if not hasattr(os, "sched_getaffinity"):
        return (None,)
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid() % len(cores)
    return (*cores[first:], *cores[:first])


def _move(core: int | None) -> None:
    """Put this thread on a core. The scheduler leaves it there while it is busy, and is free to move it."""
    if core is None:
        return
    allowed = os.sched_getaffinity(0)
    if core not in allowed:
        return
    with suppress(OSError):  # it may not be used any more: the thread stays where it is
        os.sched_setaffinity(0, {core})
    os.sched_setaffinity(0, allowed)
