"""One selection: cold, warm, missed, with rules, among many kernels; its share of a call, and its spread."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns

import torch
from benchmarking.in_force import in_force, without_kernels
from benchmarking.timing import REPEATS, each_ns, per_call_ns

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Limit
from selection_bench.measuring import Hit, Row, attention, kernel, ratio_of

# All modules of the way are imported before the selection is timed, and all of what the import takes is timed.
_COLD = """
import time
{before}
begin = time.perf_counter_ns()
import layerzero_runtime as lz
from layerzero_runtime.dispatch import select
context = lz.SelectionContext(operation="attention.full", dtype="float32", batch_size=4, seq_len_q=512, num_heads=16,
                              head_dim=64)
imported = time.perf_counter_ns()
select(context)
print(imported - begin, time.perf_counter_ns() - imported)
"""


def rows(hit: Hit) -> Iterator[Row]:
    cold, with_torch = _cold_ns(""), _cold_ns("import torch")
    text = (
        f"{sum(cold) / 1e6:.1f} ms: importing {cold[0] / 1e6:.1f}, selecting {cold[1] / 1e6:.1f}; where torch is "
        f"imported already {sum(with_torch) / 1e6:.1f} ms: {with_torch[0] / 1e6:.1f} and {with_torch[1] / 1e6:.1f}"
    )
    yield Row("PS-001", "< 10 ms", text, sum(cold), max(sum(cold), sum(with_torch)) < 10e6)
    described = attention()
    names = {"lz": lz, "hit": hit.context, "described": described, "gate": hit.gate}
    cached = per_call_ns("lz.select(described)", names, 5000)
    measured = per_call_ns("lz.select(hit)", names, 5000)
    text = f"{cached / 1e3:.1f} us from the live cache, {measured / 1e3:.1f} us from a table (described calls)"
    yield Row("PS-002", "< 100 us", text, max(cached, measured), max(cached, measured) < 100e3)
    miss = _miss_ns()
    with in_force(*(kernel(f"my.k{number}") for number in range(1000))):
        among_many = _miss_ns(50)
    text = f"{miss / 1e3:.0f} us among the built-in kernels, {among_many / 1e6:.1f} ms with 1,000 more candidates"
    yield Row("PS-003", "< 1 ms", text, miss, miss < 1e6)
    yield _rules(hit)
    yield _lookup()
    yield from _share_of_a_call(hit)
    yield from _spread(hit)
    yield _under_load()
    yield _during_updates()
    yield from _throughput(hit, names, measured)


def _cold_ns(before: str) -> tuple[float, float]:
    """(importing, selecting for the first time) in fresh processes, with compiled modules as after an installation."""
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def once() -> list[int]:
            command = [sys.executable, "-c", _COLD.format(before=before)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            return [int(part) for part in run.stdout.split()]

        once()
        found = [once() for _ in range(REPEATS)]
    imported, selected = (statistics.median(part) for part in zip(*found, strict=True))
    return imported, selected


def _miss_ns(count: int = 300) -> float:
    contexts = iter([attention(scale=1.0 + number) for number in range(count)])
    times = each_ns(lambda: lz.select(next(contexts)), count)
    return statistics.median(times)


def _rules(hit: Hit) -> Row:
    """All rules are about the call's operation, and their conditions have to be read; none applies."""
    rules = tuple(Rule("mlp.*", when=(Limit("rows", "at_least", 10**6 + number),), boost=1.0) for number in range(25))
    policy = Policy(rules, rules, rules, rules)
    [spec, *_] = [each.spec for each in dispatch.current_snapshot().registry.candidates("mlp.swiglu")]
    names = {"policy": policy, "spec": spec, "context": hit.context, "lz": lz, "hit": hit}
    evaluated = per_call_ns(
        "policy.overrules_measurement(context); policy.denial(spec, context); policy.boost(spec, context)", names, 500
    )
    lz.set_policy(policy)
    selected = per_call_ns("lz.select(context)", names, 500)
    called = per_call_ns("hit.call()", names, 500)
    lz.set_policy(None)
    decided = tuple(Rule("mlp.*", when=(Limit("dtype", "one_of", ("int8",)),), boost=1.0) for _ in range(25))
    others = Policy(decided, decided, decided, decided)
    untouched = ratio_of((lambda: lz.set_policy(others), lambda: lz.set_policy(None)), "hit.call()", names, 2000)
    text = (
        f"{evaluated / 1e3:.0f} us for 100 rules, {selected / 1e3:.0f} us a selection, {called / 1e3:.0f} us a whole "
        f"call; {untouched:.2f}x the call without a policy where the static features decide the rules"
    )
    return Row("PS-004", "< 500 us", text, evaluated, selected < 500e3)


def _lookup() -> Row:
    times = []
    for count in (10, 1000):
        registry = Registry(kernel(f"my.k{number}", operations=("norm.rms",)) for number in range(count))
        times.append(per_call_ns("registry.candidates('norm.rms')", {"registry": registry}, 100_000))
    text = f"{times[1]:.0f} ns among 1,000 kernels, {times[0]:.0f} ns among 10"
    return Row("PS-005", "O(1)", text, times[1], times[1] < 1.5 * times[0] + 20)


def _share_of_a_call(hit: Hit) -> Iterator[Row]:
    """What the front of a public call adds, beside a decode step of one layer."""
    query = torch.randn(4, 16, 1, 128, dtype=torch.bfloat16)
    key = torch.randn(4, 4, 2048, 128, dtype=torch.bfloat16)
    names = {"lz": lz, "query": query, "key": key}
    whole = per_call_ns("lz.attention(query, key, key, enable_gqa=True)", names, 10)
    with without_kernels():
        front = per_call_ns("lz.attention(query, key, key, enable_gqa=True)", names, 5000)
    text = f"{front / whole:.2%}: {front / 1e3:.1f} us before a decode step of {whole / 1e6:.1f} ms on this CPU"
    yield Row("PS-015", "< 1% overhead", text, front, front / whole < 0.01)
    yield Row(
        "PS-016",
        "in proportion",
        "cannot be measured here: a virtual machine does not set its clock; a hit reads no clock and does the same "
        "work each time (tested)",
        met=None,
    )


def _spread(hit: Hit) -> Iterator[Row]:
    """By the wall clock, and by the thread's own processor time, from which other processes are left out."""
    described = attention()
    lz.select(described)
    for scenario, calls, share, factor in (("PS-023", 1000, 0.99, 2.0), ("PS-024", 10_000, 0.999, 5.0)):

        def tail(clock: Callable[[], int], calls: int = calls, share: float = share) -> float:
            times = each_ns(lambda: lz.select(described), calls, clock)
            return times[int(share * calls)] / statistics.median(times)

        wall = sorted(tail(perf_counter_ns) for _ in range(REPEATS))
        own = statistics.median(tail(time.thread_time_ns) for _ in range(REPEATS))
        middle = statistics.median(wall)
        text = f"{middle:.2f}x ({wall[0]:.2f} to {wall[-1]:.2f}); {own:.2f}x of the thread's own processor time"
        asked = f"p{share * 100:g} < {factor:g}x median of {calls:,}"
        yield Row(scenario, asked, text, met=middle < factor)


def _under_load() -> Row:
    """Arrivals at 90% of what one thread serves; the latency counts from the arrival."""
    described = attention()
    lz.select(described)
    ratios, usual = [], 0.0
    for _ in range(REPEATS):
        idle = each_ns(lambda: lz.select(described), 5000)
        # The clock and the waiting take their share of a turn as well.
        usual, interval = statistics.median(idle), int((statistics.fmean(idle) + 200) / 0.9)
        latencies, arrival = [], perf_counter_ns()
        for _ in range(5000):
            arrival += interval
            while perf_counter_ns() < arrival:
                pass
            lz.select(described)
            latencies.append(perf_counter_ns() - arrival)
        ratios.append(statistics.median(latencies) / usual)
    ratio = statistics.median(ratios)
    text = f"{ratio:.2f}x the median of {usual / 1e3:.1f} us without load ({min(ratios):.2f} to {max(ratios):.2f})"
    return Row("PS-025", "< 2x at 90% load", text, ratio * usual, ratio < 2)


def _during_updates() -> Row:
    """One thread selects, another puts a policy of 100 rules in force again and again."""
    described = attention()
    lz.select(described)
    quiet = each_ns(lambda: lz.select(described), 20_000)
    policies = [
        Policy(denies=tuple(Rule("norm.*", kernel=f"k{number}.{turn}") for number in range(100))) for turn in range(2)
    ]
    stop = threading.Event()
    updates: list[int] = []

    def update() -> None:
        while not stop.is_set():
            begin = perf_counter_ns()
            lz.set_policy(policies[len(updates) % 2])
            updates.append(perf_counter_ns() - begin)
            time.sleep(0.01)

    thread = threading.Thread(target=update)
    thread.start()
    busy = each_ns(lambda: lz.select(described), 100_000)
    stop.set()
    thread.join()
    lz.set_policy(None)
    text = (
        f"longest of 100,000 selections {busy[-1] / 1e6:.1f} ms (p99.9 {busy[-100] / 1e3:.0f} us) over {len(updates)} "
        f"updates of {statistics.median(updates) / 1e3:.0f} us; without any {quiet[-1] / 1e6:.1f} ms"
    )
    return Row("PS-026", "spike < 10 ms", text, met=busy[-1] < 10e6)


def _throughput(hit: Hit, names: dict[str, object], measured: float) -> Iterator[Row]:
    route = hit.route
    in_hand = {"decide": route.decide, "functions": route.functions, "sizes": hit.sizes}
    lookup = per_call_ns("for rows, width in sizes: functions[decide(rows, width)]", in_hand, 50) / len(hit.sizes)
    with without_kernels():
        front = per_call_ns("lz.swiglu(gate, gate)", names, 20_000)
    text = (
        f"{1e3 / lookup:.1f} M/s of a table with the sizes in hand ({lookup:.0f} ns), {1e3 / front:.2f} M/s from "
        f"tensors (the whole front of swiglu), {1e3 / measured:.2f} M/s of described calls"
    )
    yield Row("PS-027", "> 1 M/s", text, lookup, lookup < 1000)
    counting = per_call_ns("count()", {"count": route.calls.raise_by_one}, 100_000)
    with tempfile.TemporaryDirectory() as folder:

        def overhead(hits: bool) -> float:
            path = str(Path(folder, f"{hits}.jsonl"))
            setups = lambda: lz.record_workload(path, hits=hits), lambda: lz.record_workload(None)
            return ratio_of(setups, "hit.call()", {"hit": hit}, 1000)

        misses, everything = overhead(hits=False), overhead(hits=True)
        lz.record_workload(None)
    text = (
        f"{counting / front:.1%} of the front for counting ({counting:.0f} ns); calls take {misses:.2f}x with "
        f"misses recorded, {everything:.1f}x with hits as well (every call is described)"
    )
    yield Row("PS-035", "< 5% overhead", text, counting, counting / front < 0.05)
