"""Many selections: hit rate, threads, the cache when it is full or void, long runs, little memory, the queue."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from time import perf_counter_ns

import torch
from benchmarking.in_force import in_force, without_kernels
from benchmarking.timing import each_ns

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.errors import QueueFullError
from layerzero_runtime.selection.live_cache import MAX_ENTRIES, LiveCache
from layerzero_runtime.selection.selection_queue import SelectionQueue
from selection_bench.measuring import Hit, Row, attention, calls_per_second, in_threads, kernel

THREADS = (1, 2, 4, 8, 16)
LAYERS, STEPS = 32, 2000

# Selections under a limit of the address space 8 MiB above what the process has, against the same without.
_PRESSED = """
import resource, timeit
import layerzero_runtime as lz
context = lz.SelectionContext(operation="attention.full", dtype="float32", batch_size=4, seq_len_q=512, num_heads=16,
                              head_dim=64)
def rate():
    return min(timeit.repeat(lambda: lz.select(context), number=5000, repeat=5))
rate()
free = rate()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
try:
    bytearray(64 << 20)
    raise SystemExit("the limit does not hold")
except MemoryError:
    pass
print(rate() / free)
"""


def rows(hit: Hit, seconds: float) -> Iterator[Row]:
    yield _decode_loop()
    described = attention()
    lz.select(described)
    with without_kernels():
        sums = {"select": _scaling(lambda: lz.select(described)), "front of a call": _scaling(hit.call)}
    asked = "the sum of n threads >= 0.8 of one's"
    yield Row("PS-007", asked, f"{sums['select'][16]:.2f} with 16 threads", met=sums["select"][16] >= 0.8)
    text = "; ".join(
        f"{name} " + ", ".join(f"{threads}: {ratio:.2f}" for threads, ratio in ratios.items())
        for name, ratios in sums.items()
    )
    # The interpreter changes hands at every kernel, so calls of a few microseconds slow each other, whoever makes them.
    both = [_scaling(call, (1, 4))[4] for call in (hit.call, lambda: torch.nn.functional.silu(hit.gate) * hit.gate)]
    text += f"; with the kernel {both[0]:.2f} at 4 threads (torch's own two calls {both[1]:.2f})"
    yield Row("PS-028", asked, text, met=min(min(ratios.values()) for ratios in sums.values()) >= 0.8)
    yield _eviction()
    yield _invalidation()
    yield _herd()
    yield _idle(hit)
    yield _interpreter_lock()
    yield _sustained(hit, seconds)
    pressed = float(subprocess.run([sys.executable, "-c", _PRESSED], capture_output=True, text=True, check=True).stdout)
    text = (
        f"{pressed:.2f}x the time of a hit with 8 MiB of address space left (not the machine's memory: others use it)"
    )
    yield Row("PS-030", "graceful", text, met=pressed < 2)
    yield from _queue()


def _decode_loop() -> Row:
    """Over kernels that end at several lengths, as layers of two sizes."""
    kernels = [kernel(f"my.k{number}", max_seq_len=300 * (1 + number)) for number in range(6)]
    with in_force(*kernels, kernel("my.any"), builtin=False):
        cache = dispatch.current_snapshot().live_cache
        begin = perf_counter_ns()
        for length in range(100, 100 + STEPS):
            for layer in range(LAYERS):
                heads = 16 << layer % 2
                lz.select(attention(operation="attention.cross", seq_len_q=1, seq_len_k=length, num_heads=heads))
        elapsed = perf_counter_ns() - begin
    hits, computed = cache.hits.value, cache.computed.value
    rate = hits / (hits + computed)
    text = f"{rate:.3%}: {computed} of {hits + computed:,} selections computed (2,000 growing lengths, 32 layers)"
    return Row("PS-006", "> 99%", text, elapsed / (hits + computed), rate > 0.99)


def _scaling(call: Callable[[], object], counts: Sequence[int] = THREADS) -> dict[int, float]:
    """For each number of threads, what they do together against one thread; medians of interleaved rounds."""
    rounds = [{threads: calls_per_second(threads, call, 0.3) for threads in counts} for _ in range(5)]
    return {threads: statistics.median(found[threads] / found[1] for found in rounds) for threads in counts}


def _eviction() -> Row:
    times = []
    for size in (100, MAX_ENTRIES):
        cache: LiveCache[int] = LiveCache(size)
        number = 0

        def insert(cache: LiveCache[int] = cache) -> None:
            nonlocal number
            number += 1
            cache.get((number, "key"), lambda: 1)

        each_ns(insert, size)
        times.append(statistics.fmean(each_ns(insert, 30_000)))
    text = f"{times[1] / 1e3:.1f} us an insertion into {MAX_ENTRIES:,} entries, {times[0] / 1e3:.1f} us into 100"
    return Row("PS-008", "O(1)", text, times[1], times[1] < 1.5 * times[0])


def _invalidation() -> Row:
    def update_us(entries: int) -> float:
        found = []
        for _ in range(5):
            cache = dispatch.current_snapshot().live_cache
            for number in range(entries):
                cache.get((number, "key"), lambda: lz)  # type: ignore[arg-type,return-value]
            begin = perf_counter_ns()
            lz.set_policy(None)
            found.append((perf_counter_ns() - begin) / 1e3)
        return statistics.median(found)

    full, empty = update_us(MAX_ENTRIES), update_us(0)
    text = f"a new policy: {full:.0f} us beside {MAX_ENTRIES:,} cached answers, {empty:.0f} us beside none"
    return Row("PS-009", "O(1)", text, met=full < 10 * empty + 1000)


def _herd() -> Row:
    with in_force(kernel("my.one")):
        cache = dispatch.current_snapshot().live_cache
        before = threading.stack_size(256 * 1024)
        context = attention()
        begin = perf_counter_ns()
        in_threads(1000, lambda number: lz.select(context))
        elapsed = perf_counter_ns() - begin
        threading.stack_size(before)
    took = elapsed / 1e6
    text = f"{cache.computed.value} computed, {cache.hits.value} waited or hit, {took:.0f} ms with the threads' start"
    return Row("PS-010", "1 computes, 999 wait", text, met=(cache.computed.value, cache.hits.value) == (1, 999))


def _idle(hit: Hit) -> Row:
    for _ in range(1000):
        hit.call()
    threads = threading.active_count()
    begin = time.process_time_ns()
    time.sleep(2)
    share = (time.process_time_ns() - begin) / 2e9
    return Row("PS-017", "< 0.1% when idle", f"{share:.4%}, {threads - 1} background threads", met=share < 0.001)


def _interpreter_lock() -> Row:
    query = torch.randn(1, 8, 1024, 64)
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1

    def turns_in(work: Callable[[], object]) -> float:
        before, begin = turns[0], perf_counter_ns()
        work()
        return (turns[0] - before) / (perf_counter_ns() - begin)

    thread = threading.Thread(target=count)
    thread.start()
    alone = turns_in(lambda: time.sleep(0.5))
    beside = turns_in(lambda: [lz.attention(query, query, query) for _ in range(30)])
    stop.set()
    thread.join()
    text = f"a Python thread keeps {beside / alone:.0%} of its speed beside a thread in a kernel that uses all cores"
    return Row("PS-018", "GIL released", text, met=beside / alone > 0.2)


def _sustained(hit: Hit, seconds: float) -> Row:
    described, rates = attention(), []
    begin = time.monotonic()
    resident = _resident()
    while time.monotonic() - begin < seconds:
        rates.append(calls_per_second(1, lambda: lz.select(described) and hit.call(), seconds / 20))
    half = len(rates) // 2
    ratio = statistics.median(rates[half:]) / statistics.median(rates[:half])
    grown = (_resident() - resident) / 2**20
    text = f"{ratio:.2f}x in the second half of {seconds:.0f} s, {grown:+.1f} MiB resident"
    return Row("PS-029", "stable over 1 h", text, met=ratio > 0.9 and grown < 10)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def _queue() -> Iterator[Row]:
    context = attention()
    begin = perf_counter_ns()
    queue = SelectionQueue(capacity=1000)
    futures = [queue.submit(context) for _ in range(1000)]
    submitted = perf_counter_ns()
    wait(futures)
    drained = perf_counter_ns()
    text = f"taken in {(submitted - begin) / 1e6:.0f} ms, drained {(drained - submitted) / 1e6:.0f} ms later"
    yield Row("PS-031", "1,000 in 100 ms, drained < 1 s", text, met=drained - submitted < 1e9)
    depths = {depth: statistics.median(_depth_ns(depth) for _ in range(5)) for depth in (10, 100, 1000)}
    text = ", ".join(f"{depth}: {ns / 1e6:.2f} ms" for depth, ns in depths.items())
    yield Row("PS-032", "in proportion to depth", f"last of {text}", met=depths[1000] < 15 * depths[100])
    place = _place_of_the_urgent()
    yield Row(
        "PS-033", "urgent ones first", f"the last of 500 submitted, urgent, was served number {place}", met=place < 10
    )
    refused = 0
    small = SelectionQueue(capacity=50)
    waiting = []
    for _ in range(5000):
        try:
            waiting.append(small.submit(context))
        except QueueFullError:
            refused += 1
    wait(waiting)
    text = f"{refused:,} of 5,000 refused at a capacity of 50, the others all served"
    yield Row("PS-034", "rejected or delayed", text, met=refused > 0)


def _depth_ns(depth: int) -> int:
    context = attention()
    queue = SelectionQueue(capacity=depth, workers=1)
    begin = perf_counter_ns()
    futures = [queue.submit(context) for _ in range(depth)]
    futures[-1].result()
    return perf_counter_ns() - begin


def _place_of_the_urgent() -> int:
    """How many of 500 waiting selections are served before the urgent one that came last."""
    context = attention()
    served: list[object] = []
    queue = SelectionQueue(capacity=1000, workers=1)
    begun, go_on = threading.Event(), threading.Event()
    first = queue.submit(context)

    def hold_the_worker(future: object) -> None:
        begun.set()
        go_on.wait(10)

    first.add_done_callback(hold_the_worker)
    begun.wait(10)
    futures = [queue.submit(context, priority=0 if number < 499 else -1) for number in range(500)]
    for future in futures:
        future.add_done_callback(served.append)
    go_on.set()
    wait(futures)
    return served.index(futures[-1]) + 1
