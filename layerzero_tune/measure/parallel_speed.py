"""How well the cores work together: a virtual machine may have them moved apart for minutes, and back.

On a virtual machine with 2 cores of an EPYC, PyTorch's parallel loops then took 1.3 times as long, those that share
their data up to 5 times, and serial ones the same; no counter of the system told. Kernels differ in how many such loops
they have, so that their ratios are of another machine.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from time import monotonic, perf_counter_ns, sleep
from typing import TypeVar

from layerzero_tune.measure.contention import MAX_SHARE, ProcessorTime, others_share

Part = TypeVar("Part")

# What may be missing from the best speed: on the machine above the speed varied by 3% around its best, and by 1% around
# 0.76 of it while the cores were apart.
MAX_LOSS = 0.12
# Where the speed stays low for so long, it is the machine's own.
WINDOW_S = 1200.0
# How long a contest waits for the speed to come back: on the machine above it did so in seconds, or after minutes.
PATIENCE_S = 10.0
# How often it looks meanwhile, and what a part of it costs its patience that is taken again.
_LOOK_S = 0.25
# Elements per thread: torch's own grain (at::internal::GRAIN_SIZE), below which loops are serial.
_GRAIN = 32768
_BLOCKS, _CALLS = 9, 50


class ParallelSpeed:
    """The time of a small parallel loop, against its best of the last `WINDOW_S`.

    `measure` gives the loop's time in any unit, `now` the time in s.
    """

    def __init__(self, measure: Callable[[], float], now: Callable[[], float] = monotonic) -> None:
        self._measure = measure
        self._now = now
        self._seen: deque[tuple[float, float]] = deque()

    def lost(self) -> float:
        """The share of the best speed that is missing now."""
        now, time = self._now(), self._measure()
        self._seen.append((now, time))
        while self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()
        return 1.0 - min(time for _, time in self._seen) / time


class FullSpeed:
    """Takes the parts of one contest while the cores are as fast together as they have been.

    Attributes:
        lost: the largest share of the speed that was missing in a part that was kept, because the contest had no
            patience left; 0 where there is none.
    """

    def __init__(self, speed: ParallelSpeed, waiting: Callable[[], None]) -> None:
        self.lost = 0.0
        self._speed = speed
        self._waiting = waiting
        self._patience_s = PATIENCE_S

    def wait(self) -> None:
        """Wait for the speed, as long as the patience lasts, unless other processes are what takes it."""
        while self._patience_s > 0.0 and self._speed.lost() > MAX_LOSS:
            self._waiting()
            self._patience_s -= _LOOK_S
            start = ProcessorTime.now()
            sleep(_LOOK_S)
            if others_share(start, ProcessorTime.now()) > MAX_SHARE:
                self._patience_s = 0.0

    def take(self, part: Callable[[], Part]) -> Part:
        """What the part gives, taken again where the speed was lost meanwhile, as long as the patience lasts."""
        while True:
            found = part()
            lost = self._speed.lost()
            if lost <= MAX_LOSS:
                return found
            if self._patience_s <= 0.0:
                self.lost = max(self.lost, lost)
                return found
            self._patience_s -= _LOOK_S
            self.wait()


def parallel_loop() -> Callable[[], float]:
    """A loop on all of torch's threads; the function gives its time in ns, the median of some blocks of calls, in a few
    ms."""
    import torch

    count = _GRAIN * torch.get_num_threads()
    first, second, total = torch.rand(count), torch.rand(count), torch.empty(count)

    def block() -> float:
        start = perf_counter_ns()
        for _ in range(_CALLS):
            torch.add(first, second, out=total)
        return (perf_counter_ns() - start) / _CALLS

    return lambda: statistics.median(block() for _ in range(_BLOCKS))
