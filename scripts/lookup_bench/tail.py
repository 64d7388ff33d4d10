"""How much longer than the median the slowest of a thousand lookups takes, and what a million hits leave in memory."""

from __future__ import annotations

import gc
import statistics
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import torch
from benchmarking.timing import Loop, lru_hit

from lookup_bench.answered import Contexts
from lookup_bench.calls import alternating, changing
from lookup_bench.lookups import CALLS, bound_to, fresh_sizes
from lookup_bench.row import Row
from lookup_bench.stopwatch import Effort

# Beside nothing a hit: the ints in which counters stand, and the last call that a fast path remembers.
KEPT_BYTES = 1024


def tail_rows(answered: Mapping[str, Contexts], effort: Effort) -> Iterator[Row]:
    """Each call timed by itself, the garbage collector on."""
    decode = answered["attention.cross"]
    kernel, sizes = bound_to(decode[0]).kernel, fresh_sizes(decode, same=False)
    yardstick = lru_hit()
    name = f"bound {decode[0].operation}.kernel(sizes), p99.9 over the median"
    yield _tail(name, "< 5x", lambda: _each_of_three(kernel, sizes, effort.tail_calls), effort.repeats)
    hits = yardstick.names["cached"], yardstick.names["arguments"]
    yield _tail(
        "lru_cache hit, p99.9 over the median", "", lambda: _each_of_four(*hits, effort.tail_calls), effort.repeats
    )


def _tail(name: str, asked: str, times: Callable[[], list[int]], repeats: int) -> Row:
    """The clock's own time is taken off: it is as long as what is timed, and would hide half of the ratio."""
    clock = statistics.median(_clock_ns(10_000))
    ratios, medians, raw = [], [], []
    assert gc.isenabled()
    for _ in range(repeats):
        found = sorted(times())
        median, slow = statistics.median(found), found[int(0.999 * len(found))]
        medians.append(median - clock)
        ratios.append((slow - clock) / (median - clock))
        raw.append(slow / median)
    ratio = statistics.median(ratios)
    note = f"less the clock's {clock:.0f} ns; {statistics.median(raw):.2f}x with them"
    met = ratio < 5 if asked else None
    return Row(name, asked, statistics.median(medians), ratio, min(ratios), max(ratios), note, met, "tail")


def _clock_ns(calls: int) -> list[int]:
    times = []
    for _ in range(calls):
        begin = perf_counter_ns()
        times.append(perf_counter_ns() - begin)
    return times


# A function for each number of arguments: passing them on as a list would take as long as the lookup.
def _each_of_three(call: Callable[..., object], arguments: Sequence[Any], calls: int) -> list[int]:
    times = []
    for _ in range(max(1, calls // len(arguments))):
        for a, b, c in arguments:
            begin = perf_counter_ns()
            call(a, b, c)
            times.append(perf_counter_ns() - begin)
    return times


def _each_of_four(call: Callable[..., object], arguments: Sequence[Any], calls: int) -> list[int]:
    times = []
    for _ in range(max(1, calls // len(arguments))):
        for a, b, c, d in arguments:
            begin = perf_counter_ns()
            call(a, b, c, d)
            times.append(perf_counter_ns() - begin)
    return times


def memory_row(answered: Mapping[str, Contexts], hits: int) -> Row:
    """What several paths leave in memory, in one row."""
    decode, norm = answered["attention.cross"], answered["norm.rms"]
    calls = fresh_sizes(decode, same=False)
    sizes = Loop("for batch, q, k in calls: f(batch, q, k)", {"f": bound_to(decode[0]).kernel, "calls": calls}, CALLS)
    with torch.no_grad():
        kept = {
            "kernel(sizes)": _kept(sizes, hits),
            "bound norm.rms": _kept(changing(norm).bound(bound_to(norm[0])), hits),
            "bound attention.cross": _kept(changing(decode).bound(bound_to(decode[0])), hits),
            "lz.attention": _kept(alternating(decode).public(), hits),
            "lz.rms_norm": _kept(alternating(norm).public(), hits),
        }
    note = ", ".join(f"{name} {size}" for name, size in kept.items()) + f" bytes after {hits:,} hits of each"
    return Row("memory kept", "0 bytes a hit", None, None, None, None, note, max(kept.values()) <= KEPT_BYTES, "memory")


def _kept(loop: Loop, hits: int) -> int:
    """Bytes allocated in the hits and not freed, behind a warm-up in which all that stays is allocated."""
    code, names = compile(loop.statement, "<hits>", "exec"), dict(loop.names)

    def traced_after(calls: int) -> int:
        for _ in range(calls // loop.calls + 1):
            exec(code, names)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = traced_after(CALLS)
        return traced_after(hits) - before
    finally:
        tracemalloc.stop()
