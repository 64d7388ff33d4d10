"""`Stopwatch`: times a path next to the yardstick, again and again."""

from __future__ import annotations

import statistics
import timeit
from dataclasses import dataclass

from benchmarking.timing import Loop, lru_hit


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: of every measurement; each gives one ratio.
        slices: of yardstick, path and baseline, taken in turn in one repeat. The fastest of each counts: what else runs
            on the machine makes a slice longer, never shorter.
        slice_ns: length of a slice.
        rate_s: length of a repeat of lookups on end.
        tail_calls: lookups of which each is timed by itself, in one repeat.
        hits: after which the memory is looked at.
        processes: fresh ones, of everything that happens once in a process.
    """

    repeats: int = 5
    slices: int = 15
    slice_ns: float = 1e6
    rate_s: float = 1.0
    tail_calls: int = 200_000
    hits: int = 1_000_000
    processes: int = 7


# To see that everything runs; the times say nothing.
QUICK = Effort(repeats=2, slices=1, slice_ns=1e5, rate_s=0.02, tail_calls=10_000, hits=5_000, processes=1)


@dataclass(frozen=True)
class Timed:
    """Of the repeats: the median time in nanoseconds, and the median, smallest and largest ratio to the yardstick."""

    ns: float
    ratio: float
    low: float
    high: float


class Stopwatch:
    """Times paths.

    Attributes:
        yardsticks: the time of the yardstick in nanoseconds, of each repeat of each path so far.
    """

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.yardsticks: list[float] = []

    def timed(self, path: Loop, baseline: Loop | None = None) -> Timed:
        """What one call of the path takes, less what one of the baseline takes; the garbage collector is off."""
        ours = [_Sliced(loop, self.effort.slice_ns) for loop in (path, baseline) if loop is not None]
        times, ratios = [], []
        for _ in range(self.effort.repeats):
            # A yardstick of its own: where its ints come to lie in memory moves it by a tenth.
            loops = [_Sliced(lru_hit(), self.effort.slice_ns), *ours]
            slices = [[loop.ns() for loop in loops] for _ in range(self.effort.slices)]
            yardstick, whole, *less = (min(found) for found in zip(*slices, strict=True))
            ns = whole - sum(less)
            self.yardsticks.append(yardstick)
            times.append(ns)
            ratios.append(ns / yardstick)
        return Timed(statistics.median(times), statistics.median(ratios), min(ratios), max(ratios))


class _Sliced:
    """A loop that is run for about a slice at a time."""

    def __init__(self, loop: Loop, slice_ns: float) -> None:
        self._timer: timeit.Timer = loop.timer()
        self._calls = loop.calls
        once = min(self._timer.repeat(4, 1)) * 1e9
        self._runs = max(1, round(slice_ns / once))

    def ns(self) -> float:
        return self._timer.timeit(self._runs) / (self._runs * self._calls) * 1e9
