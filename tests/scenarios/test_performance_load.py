"""Performance, PS-017, PS-018, PS-023 to PS-026, PS-028 to PS-030: many calls, long runs, and little to run them on."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime import snapshot as snapshot_module
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.selection.live_selector import LiveSelector, Ranking
from layerzero_runtime.serving import prepared
from layerzero_runtime.serving.seen_calls import MAX_SEEN
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables import prior
from layerzero_runtime.tables.prior import Prior
from tests.runtime.test_snapshot import in_threads
from tests.scenarios.conftest import H100, attention, beside_builtin, kernel, only
from tests.scenarios.watching import all_locks_held, measured_tables, promptly

GATE = torch.randn(1, 32)
ON_CPU: dict[str, Any] = {
    "operations": ("mlp.swiglu",),
    "platforms": ("cpu",),
    "dtypes": ("float64",),
    "priority": 200,
}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Snapshot]:
    with measured_tables(tmp_path) as snapshot:
        lz.swiglu(GATE, GATE)
        yield snapshot


@pytest.mark.scenario("PS-017")
def test_threads_of_its_own_run_only_while_there_is_something_to_wait_for(tmp_path: Path) -> None:
    code = f"""
import asyncio, threading
import torch
import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.selection import selection_queue

def running():
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]

def ended(names):
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            assert thread.daemon
            thread.join(20)
    return running() == []

gate = torch.randn(2, 3, dtype=torch.float64)
context = lz.SelectionContext(operation="mlp.swiglu", dtype="float64", rows=2, hidden_size=3)
lz.swiglu(gate, gate), lz.select(context), lz.set_policy(lz.Policy())
assert running() == [], running()

dispatch.health().failed("torch.swiglu.in_place", "test")
[timer] = threading.enumerate()[1:]
assert isinstance(timer, threading.Timer) and 20 < timer.interval <= 30, timer
dispatch.health().reset()
assert ended(running()), running()

lz.record_workload({str(tmp_path / "workload.jsonl")!r})
lz.swiglu(gate, gate)
assert running() == ["layerzero-workload"], running()
lz.record_workload(None)
assert ended(running()), running()

queue = selection_queue.SelectionQueue(idle_s=0.1)
assert running() == []
assert queue.submit(context).result(20).kernel_id == lz.select(context).kernel_id
assert running() in (["layerzero-select"], []), running()
assert ended(running()), running()
assert queue.submit(context).result(20)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def progress_meanwhile(work: Callable[[], object]) -> int:
    """How many turns another Python thread takes while `work` runs, if nobody is made to give up the interpreter."""
    turns, stop, started = [0], threading.Event(), threading.Event()

    def take_turns() -> None:
        while not stop.is_set():
            turns[0] += 1
            started.set()
            time.sleep(0)  # lets whoever waits for the interpreter have it

    interval = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    other.start()
    try:
        assert started.wait(30)
        sys.setswitchinterval(100.0)
        before = turns[0]
        work()
        return turns[0] - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join(30)


@pytest.mark.scenario("PS-018")
def test_other_threads_run_while_a_kernel_does() -> None:
    query = torch.randn(1, 8, 768, 64)

    def python_alone(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        sum(number * number for number in range(1_000_000))
        return gate

    gate = torch.randn(3, 7, dtype=torch.float64)
    with beside_builtin(kernel("my.python", python_alone, **ON_CPU)):
        lz.attention(query, query, query)
        lz.swiglu(gate, gate)
        # Long enough for a busy machine to give the other thread a processor.
        assert progress_meanwhile(lambda: [lz.attention(query, query, query) for _ in range(20)]) > 100
        # The measure is good: a kernel in Python keeps the interpreter to itself.
        assert progress_meanwhile(lambda: lz.swiglu(gate, gate)) < 10


@pytest.mark.scenario("PS-023", "PS-028")
def test_calls_and_selections_hit_while_every_lock_is_taken(table: Snapshot) -> None:
    """No thread waits for another, so one that is interrupted makes no other slow."""
    described, expected = attention(device=H100), silu(GATE) * GATE
    plan = lz.select(described)
    misses = lz.stats()["misses"]
    for threads in (1, 2, 4, 8, 16):
        calls = lz.stats()["calls"]
        with all_locks_held():

            def work(number: int) -> None:
                for _ in range(50):
                    torch.testing.assert_close(lz.swiglu(GATE, GATE), expected)
                    assert lz.select(described).kernel_id == plan.kernel_id

            promptly(partial(in_threads, work, threads))
        assert lz.stats()["calls"] == calls + 50 * threads
        assert lz.stats()["misses"] == misses


@pytest.mark.scenario("PS-024")
def test_hits_make_no_work_for_the_garbage_collector(table: Snapshot) -> None:
    described = attention(device=H100)

    def calls() -> None:
        for _ in range(3000):
            lz.swiglu(GATE, GATE)

    def selections() -> None:
        for _ in range(3000):
            lz.select(described)

    calls()
    selections()
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    calls()
    # What a hit allocates is gone before the next, so that no threshold is ever reached.
    assert [generation["collections"] for generation in gc.get_stats()] == before
    gc.disable()
    try:
        gc.collect()
        calls()
        selections()
        # And nothing is in a cycle.
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.scenario("PS-025")
def test_neither_hits_nor_other_misses_wait_for_a_slow_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    rank = LiveSelector.rank

    def slow(selector: LiveSelector, context: SelectionContext, prior: Prior) -> Ranking:
        if context.head_dim == 256:
            begun.set()
            assert go_on.wait(60)
        return rank(selector, context, prior)

    monkeypatch.setattr(LiveSelector, "rank", slow)
    with only(kernel("a.one"), kernel("b.two", max_head_dim=64)) as snapshot:
        lz.select(attention(head_dim=64))
        waiting = [threading.Thread(target=lz.select, args=(attention(head_dim=256),)) for _ in range(8)]
        for thread in waiting:
            thread.start()
        assert begun.wait(30)
        try:
            assert promptly(lambda: lz.select(attention(head_dim=64))).cached
            for number in range(8):
                promptly(lambda number=number: lz.select(attention(head_dim=32, scale=1.0 + number)))  # type: ignore[misc]
            assert snapshot.live_cache.computed.value == 1 + 8
        finally:
            go_on.set()
            for thread in waiting:
                thread.join(30)
        assert snapshot.live_cache.computed.value == 1 + 8 + 1


@pytest.mark.scenario("PS-026")
def test_calls_are_served_while_a_policy_is_being_put_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    building, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **keywords: Any) -> Snapshot:
        building.set()
        assert go_on.wait(60)
        return Snapshot(*arguments, **keywords)

    with only(kernel("a.first", priority=90), kernel("b.second")) as before:
        monkeypatch.setattr(dispatch, "Snapshot", slow)
        update = threading.Thread(target=lz.set_policy, args=(Policy(denies=(Rule(kernel="a.*"),)),))
        update.start()
        try:
            assert building.wait(30)
            # Hits and misses alike, all under the old one.
            plans = promptly(lambda: [lz.select(attention(head_dim=1 + number % 50)) for number in range(100)])
            assert {plan.kernel_id for plan in plans} == {"a.first"}
            assert dispatch.current_snapshot() is before
        finally:
            go_on.set()
            update.join(30)
        assert lz.select(attention()).kernel_id == "b.second"


def distinct_calls(numbers: range) -> None:
    """Calls and selections no two of which share their features."""
    query = torch.randn(1, 1, 4, 8)
    for number in numbers:
        scale = 1.0 + number
        right = torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=scale)
        torch.testing.assert_close(lz.attention(query, query, query, scale=scale), right)
        lz.select(attention(device=H100, scale=scale))


@pytest.mark.scenario("PS-029")
def test_what_is_kept_does_not_grow_with_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a call may leave behind, with small bounds: an hour of ever new features ends at these."""
    monkeypatch.setattr(snapshot_module, "MAX_ROUTES", 20)
    monkeypatch.setattr(prepared, "MAX_PREPARED", 25)
    monkeypatch.setattr(prior, "MAX_KEPT", 15)
    # Of this process so far; the bound is on what is added.
    dispatch._prepared._prepared.clear()
    snapshot = dispatch.publish_snapshot()
    snapshot.live_cache = LiveCache(30)
    calls = lz.stats()["calls"]
    distinct_calls(range(150))
    assert len(snapshot._routes) == 20
    assert all(len(getattr(snapshot.seen, name)) <= MAX_SEEN for name in ("attention", "rms_norm", "swiglu"))
    assert len(snapshot.live_cache) == 30
    assert lz.stats()["calls"] == calls + 150
    assert len(dispatch._prepared._prepared) == 25
    assert all(len(nearest._found) <= 15 for nearest in snapshot.tables._nearest.values())


@pytest.mark.scenario("PS-030")
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_without_memory_for_one_kernel_another_serves(error: type[Exception]) -> None:
    attempts: list[int] = []

    def hungry(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        attempts.append(1)
        raise error("out of memory")

    gate = torch.randn(3, 7, dtype=torch.float64)
    before = lz.stats()["fallbacks"]
    with beside_builtin(kernel("my.hungry", hungry, **ON_CPU)):
        for _ in range(20):
            torch.testing.assert_close(lz.swiglu(gate, gate), silu(gate) * gate)
        # One call paid for it, the others did not come near it again.
        assert len(attempts) == 1
        assert lz.stats()["fallbacks"] - before == 1
        assert lz.stats().broken == ("my.hungry",)


@pytest.mark.scenario("PS-030")
def test_a_selection_that_finds_no_memory_is_made_again_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = LiveSelector.rank
    failing = [MemoryError()]

    def starved(selector: LiveSelector, context: SelectionContext, prior: Prior) -> Ranking:
        if failing:
            raise failing.pop()
        return rank(selector, context, prior)

    monkeypatch.setattr(LiveSelector, "rank", starved)
    with only(kernel("a.one")) as snapshot:
        with pytest.raises(MemoryError):
            lz.select(attention())
        assert len(snapshot.live_cache) == 0
        assert lz.select(attention()).kernel_id == "a.one"
        assert lz.select(attention()).cached
