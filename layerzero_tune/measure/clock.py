"""Clocks: what a call of a kernel takes, and the parts of a contest that are timed by any of them."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Protocol

from layerzero_runtime.kernel import KernelFunction
from layerzero_tune.measure.inputs import Arguments

# A sample of short calls is the median of this many blocks of calls, so that one interruption does not decide it.
BLOCKS = 5
# The first call may stall for longer than a warm-up lasts (code is loaded, a graph goes to its device), and alone it
# would say that its kernel is many times slower than it is: of 12,556 contests on an H100 some twenty hold candidates
# at eight times of what all shapes around theirs say.
_WARM_UP_CALLS = 3
_STALL = 10.0


TimedCalls = Callable[[int], float]
"""Makes at least so many calls of one kernel and gives the time of a call in ns."""


class Rotation:
    """Hands out the argument sets in turn, each next sample beginning where the one before ended."""

    def __init__(self, sets: Sequence[Arguments]) -> None:
        self._sets = sets
        self._next = 0

    def take(self, calls: int) -> list[Arguments]:
        count = len(self._sets)
        taken = [self._sets[(self._next + call) % count] for call in range(calls)]
        self._next = (self._next + calls) % count
        return taken


def time_calls(function: KernelFunction, arguments: Sequence[Arguments]) -> float:
    """Wall time in ns per call of one call for each of `arguments`, back to back, the garbage collector off.

    Of a call's time, some 10 ns are the loop's own: the list of arguments is built before.
    """
    with collector_off():
        start = perf_counter_ns()
        for call in arguments:
            function(*call)
        end = perf_counter_ns()
    return (end - start) / len(arguments)


@contextmanager
def collector_off() -> Iterator[None]:
    """Without the garbage collector, which would fall on any call; afterwards it is on again if it was."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Clock(Protocol):
    """A way to time the calls of kernels."""

    def timed(self, function: KernelFunction, rotation: Rotation) -> TimedCalls:
        """The function's calls, each on the next arguments, made ready to be timed; what the function raises is
        raised."""


class WallClock:
    """The wall time of calls back to back, on a CPU: each is done when it returns."""

    def timed(self, function: KernelFunction, rotation: Rotation) -> TimedCalls:
        return lambda calls: time_calls(function, rotation.take(calls))


def warm_up(timed: TimedCalls, duration_ms: float) -> float:
    """Call for that long, and `_WARM_UP_CALLS` times if that takes no more than `_STALL` times as long; the median of
    the later half of the calls in ns."""
    times: list[float] = []
    elapsed = 0.0
    enough = duration_ms * 1e6
    while not times or elapsed < enough or (len(times) < _WARM_UP_CALLS and elapsed < _STALL * enough):
        start = perf_counter_ns()
        times.append(timed(1))
        elapsed += perf_counter_ns() - start
    return statistics.median(times[len(times) // 2 :])


def take_sample(timed: TimedCalls, call_ns: float, duration_ms: float, blocks: int = BLOCKS) -> float:
    """Time in ns per call over at least `duration_ms` of calls that take about `call_ns` each; at least one call."""
    calls = max(1, math.ceil(duration_ms * 1e6 / max(call_ns, 1.0)))
    blocks = min(blocks, calls)
    per_block = math.ceil(calls / blocks)
    return statistics.median(timed(per_block) for _ in range(blocks))
