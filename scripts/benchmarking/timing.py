"""The clock and the yardstick."""

from __future__ import annotations

import gc
import statistics
import timeit
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter_ns
from typing import Any

REPEATS = 7


@dataclass(frozen=True)
class Loop:
    """A statement that makes `calls` calls of what is timed, and the names that it uses."""

    statement: str
    names: Mapping[str, Any]
    calls: int = 1

    def timer(self) -> timeit.Timer:
        """It times with the garbage collector off."""
        return timeit.Timer(self.statement, globals=dict(self.names))


def per_call_ns(statement: str, names: Mapping[str, Any], calls: int, repeats: int = REPEATS) -> float:
    """Median time of a statement, the garbage collector off."""
    timer = Loop(statement, names).timer()
    timer.timeit(max(1, calls // 10))
    return statistics.median(timer.repeat(repeats, calls)) / calls * 1e9


def each_ns(call: Callable[[], object], calls: int, clock: Callable[[], int] = perf_counter_ns) -> list[int]:
    """The time of every single call, ascending; some 40 ns of each are the clock's."""
    times = []
    for _ in range(calls):
        begin = clock()
        call()
        times.append(clock() - begin)
    return sorted(times)


def fresh_ints(count: int, places: int) -> list[tuple[int, ...]]:
    """Tuples of ints that are new objects each, as sizes read off tensors are; 97 different tuples in turn."""
    return [tuple(int(f"{1000 + (number * 7 + place) % 97}") for place in range(places)) for number in range(count)]


def lru_hit() -> Loop:
    """The yardstick: a hit of a plain `lru_cache` with four positional ints that are new objects at every call."""

    @lru_cache(maxsize=1024)
    def cached(a: int, b: int, c: int, d: int) -> int:
        return a

    arguments = fresh_ints(2000, 4)
    names = {"cached": cached, "arguments": arguments}
    return Loop("for a, b, c, d in arguments: cached(a, b, c, d)", names, len(arguments))


def lru_hit_ns() -> float:
    """What a hit takes now."""
    yardstick = lru_hit()
    return per_call_ns(yardstick.statement, yardstick.names, 20) / yardstick.calls


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes that what `make` returns holds."""
    make()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        del made
        return held
    finally:
        tracemalloc.stop()
