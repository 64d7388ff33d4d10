"""`select_async` and the queue behind it: order, bounds, cancellation, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError, ContextTypeError, NoKernelAvailableError, QueueFullError
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.selection import selection_queue
from layerzero_runtime.selection.selection_queue import SelectionQueue, select_async
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import tables_in_force

LONG_S = 60.0


def swiglu(rows: int = 4, hidden_size: int = 64) -> SelectionContext:
    return SelectionContext(operation="mlp.swiglu", dtype="float32", rows=rows, hidden_size=hidden_size)


class GatedPolicy(Policy):
    """A policy of one's own whose rules take as long as the test wants: computing a selection waits for `opened`."""

    reached: threading.Event
    opened: threading.Event

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "reached", threading.Event())
        object.__setattr__(self, "opened", threading.Event())

    def denial(self, spec: KernelSpec, context: SelectionContext) -> str | None:
        self.reached.set()
        opened = self.opened.wait(LONG_S)
        self.opened.set()  # where nobody opened it in time, one test fails and no other waits
        assert opened
        return None


@pytest.fixture(scope="module", autouse=True)
def no_tables() -> Iterator[Snapshot]:
    """Every selection is the live selector's, computed once for a class of contexts."""
    with tables_in_force(None) as snapshot:
        yield snapshot


@pytest.fixture
def put_queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SelectionQueue]]:
    """Puts a queue of one's own in force for `select_async`; its workers have ended after the test."""
    before = set(threading.enumerate())

    def put(capacity: int = 1024, workers: int = 1) -> SelectionQueue:
        queue = SelectionQueue(capacity, workers, idle_s=0.05)
        monkeypatch.setattr(selection_queue, "_queue", queue)
        return queue

    yield put
    for thread in set(threading.enumerate()) - before:
        if thread.name == "layerzero-select":
            thread.join(LONG_S)
            assert not thread.is_alive()


@pytest.fixture
def gate(put_queue: Callable[..., SelectionQueue]) -> Iterator[GatedPolicy]:
    """A new snapshot, in which nothing is computed yet and nothing will be before the gate is opened: after the test at
    the latest, ahead of the end of the workers."""
    gate = GatedPolicy()
    lz.set_policy(gate)
    yield gate
    gate.opened.set()
    lz.set_policy(None)


def selections() -> int:
    """How many selections the snapshot in force has answered."""
    stats = lz.stats()
    return stats["live_cache_hits"] + stats["live_cache_computed"]


def busy(queue: SelectionQueue, gate: GatedPolicy) -> Future[ExecutionPlan]:
    """Give the one worker of a queue something that it cannot finish before the gate opens."""
    future = queue.submit(swiglu())
    assert gate.reached.wait(LONG_S)
    return future


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():
            await asyncio.sleep(0.001)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, LONG_S))


@pytest.mark.scenario("CS-033")
def test_many_tasks_await_while_the_event_loop_goes_on(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    put_queue(workers=2)
    contexts = [swiglu(rows) for rows in range(1, 201)]

    async def main() -> list[ExecutionPlan]:
        tasks = [asyncio.create_task(select_async(context)) for context in contexts]
        await until(gate.reached.is_set)
        # The loop has got here while a selection is stuck; another task of it would as well.
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        gate.opened.set()
        return await asyncio.gather(*tasks)

    plans = run(main())
    assert [plan.kernel_id for plan in plans] == [lz.select(context).kernel_id for context in contexts]


@pytest.mark.scenario("CS-034")
def test_synchronous_and_asynchronous_callers_get_the_same(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    """They meet in one computation: some wait for it in a loop, some block a thread, one blocks a loop."""
    put_queue(workers=2)
    found: list[ExecutionPlan] = []
    errors: list[BaseException] = []

    def collected(selection: Callable[[], list[ExecutionPlan]]) -> None:
        try:
            found.extend(selection())
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    async def asynchronous() -> list[ExecutionPlan]:
        tasks = [asyncio.create_task(select_async(swiglu())) for _ in range(50)]
        return [lz.select(swiglu()), *await asyncio.gather(*tasks)]

    callers: list[Callable[[], list[ExecutionPlan]]] = [lambda: [lz.select(swiglu()) for _ in range(50)]] * 4
    callers += [lambda: run(asynchronous())] * 4
    threads = [threading.Thread(target=collected, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    assert gate.reached.wait(LONG_S)
    gate.opened.set()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert errors == []
    assert len(found) == 4 * 50 + 4 * 51
    assert len({plan.kernel_id for plan in found}) == 1
    assert lz.stats()["live_cache_computed"] == 1


@pytest.mark.scenario("CS-034")
def test_several_event_loops_share_the_queue(put_queue: Callable[..., SelectionQueue]) -> None:
    queue = put_queue(workers=2)
    counts: list[int] = []

    async def main() -> None:
        plans = await asyncio.gather(*(select_async(swiglu(rows)) for rows in range(1, 101)))
        counts.append(len(plans))

    threads = [threading.Thread(target=lambda: run(main())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert counts == [100] * 6
    assert len(queue) == 0


@pytest.mark.scenario("CS-035")
def test_cancelled_tasks_leave_the_queue_and_nothing_behind(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue()
    first = busy(queue, gate)
    watched: list[weakref.ref[Future[ExecutionPlan]]] = []
    submit = queue.submit

    def submit_watched(context: SelectionContext, priority: int = 0) -> Future[ExecutionPlan]:
        future = submit(context, priority)
        watched.append(weakref.ref(future))
        return future

    queue.submit = submit_watched  # type: ignore[method-assign]

    async def main() -> None:
        tasks = [asyncio.create_task(select_async(swiglu(7777), priority)) for priority in [0, 1, 2, 3] * 5]
        await until(lambda: len(queue) == len(tasks))
        cancelled, kept = tasks[:12], tasks[12:]
        for task in cancelled:
            task.cancel()
        assert {type(error) for error in await asyncio.gather(*cancelled, return_exceptions=True)} == {
            asyncio.CancelledError
        }
        # Out of the queue at once, though its worker is stuck.
        assert len(queue) == len(kept)
        del cancelled
        gc.collect()
        assert sum(reference() is not None for reference in watched) == len(kept)
        gate.opened.set()
        assert len(await asyncio.gather(*kept)) == len(kept)

    run(main())
    first.result(LONG_S)
    # Nothing was computed for the cancelled ones.
    assert selections() == 1 + 8
    assert len(queue) == 0
    assert queue._lanes == {}
    gc.collect()
    assert [reference() for reference in watched] == [None] * 20
    assert not any(type(kept) is SelectionContext and kept.rows == 7777 for kept in gc.get_objects())


@pytest.mark.scenario("CS-035")
def test_a_task_that_is_cancelled_while_its_selection_runs_ends_at_once(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue()

    async def main() -> None:
        task = asyncio.create_task(select_async(swiglu()))
        await until(gate.reached.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not gate.opened.is_set()

    run(main())
    gate.opened.set()
    # Its worker is not lost.
    assert queue.submit(swiglu()).result(LONG_S).kernel_id == lz.select(swiglu()).kernel_id


@pytest.mark.scenario("CS-035")
def test_a_loop_that_ends_takes_its_selections_with_it(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue()
    busy(queue, gate)
    tasks = set()

    async def main() -> None:
        for _ in range(10):
            tasks.add(asyncio.create_task(select_async(swiglu())))
        await until(lambda: len(queue) == 10)
        raise RuntimeError("the server stops")

    with pytest.raises(RuntimeError, match="the server stops"):
        run(main())
    assert len(queue) == 0


@pytest.mark.scenario("CS-021")
def test_an_urgent_selection_that_meets_a_computation_of_a_patient_one_shares_its_result(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue(workers=2)
    patient = queue.submit(swiglu(), priority=10)
    assert gate.reached.wait(LONG_S)
    urgent = [queue.submit(swiglu(), priority=-10) for _ in range(5)]
    assert not wait([patient, *urgent], timeout=0.05).done
    gate.opened.set()
    plans = [future.result(LONG_S) for future in (patient, *urgent)]
    assert {plan.kernel_id for plan in plans} == {lz.select(swiglu()).kernel_id}
    assert lz.stats()["live_cache_computed"] == 1


@pytest.mark.scenario("CS-021")
def test_an_urgent_selection_is_served_while_a_patient_one_is_computed(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    gate.opened.set()
    known = lz.select(swiglu())
    gate.opened.clear()
    gate.reached.clear()
    queue = put_queue(workers=2)
    other = SelectionContext(operation="norm.rms", dtype="float32", rows=4, hidden_size=64)
    patient = queue.submit(other, priority=10)
    assert gate.reached.wait(LONG_S)
    assert queue.submit(swiglu(), priority=0).result(LONG_S).kernel_id == known.kernel_id
    assert not patient.done()


@pytest.mark.scenario("PS-033")
def test_urgent_selections_go_first_and_equals_in_order_of_arrival(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    """The contexts are equal, and have no order: they are never compared."""
    queue = put_queue()
    busy(queue, gate)
    priorities = [5, 0, 5, -1, 0, 1000, -1, 5]
    served: list[int] = []
    futures = []
    for number, priority in enumerate(priorities):
        future = queue.submit(swiglu(), priority)
        future.add_done_callback(lambda _, number=number: served.append(number))  # type: ignore[misc]
        futures.append(future)
    gate.opened.set()
    wait(futures, LONG_S)
    assert served == sorted(range(len(priorities)), key=lambda number: priorities[number]) == [3, 6, 1, 4, 0, 2, 7, 5]


@pytest.mark.parametrize("priority", ["high", 1.5, True, None])
def test_a_priority_is_an_integer(priority: Any, put_queue: Callable[..., SelectionQueue]) -> None:
    queue = put_queue()
    with pytest.raises(ContextTypeError, match="priority must be an integer"):
        run(select_async(swiglu(), priority))
    assert len(queue) == 0


@pytest.mark.scenario("PS-031")
def test_a_burst_of_a_thousand_is_absorbed_and_drains(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue(workers=2)
    depths: list[int] = []

    async def main() -> list[ExecutionPlan]:
        tasks = [asyncio.create_task(select_async(swiglu(rows))) for rows in range(1, 1001)]
        await until(lambda: len(queue) == 1000 - 2)
        depths.append(len(queue))
        gate.opened.set()
        return await asyncio.gather(*tasks)

    rejected = lz.stats().get("selections_rejected", 0)
    plans = run(main())
    assert len(plans) == 1000
    assert {plan.kernel_id for plan in plans} == {lz.select(swiglu()).kernel_id}
    assert depths == [998]
    assert len(queue) == 0
    assert lz.stats().get("selections_rejected", 0) == rejected


@pytest.mark.scenario("PS-032")
@pytest.mark.parametrize("depth", [10, 100, 1000])
def test_a_selection_waits_for_those_before_it_and_for_no_others(
    depth: int, gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue()
    busy(queue, gate)
    served: list[int] = []
    futures = []
    for number in range(depth):
        assert len(queue) == number
        future = queue.submit(swiglu())
        future.add_done_callback(lambda _, number=number: served.append(number))  # type: ignore[misc]
        futures.append(future)
    gate.opened.set()
    wait(futures, LONG_S)
    assert served == list(range(depth))


@pytest.mark.scenario("FS-026")
@pytest.mark.scenario("PS-034")
def test_a_full_queue_refuses_at_once_and_takes_more_when_it_has_drained(
    gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]
) -> None:
    queue = put_queue(capacity=8, workers=2)
    rejected = lz.stats().get("selections_rejected", 0)

    async def main() -> None:
        # Both workers are busy: the second waits for the first one's computation.
        running = [asyncio.create_task(select_async(swiglu())) for _ in range(2)]
        await until(lambda: gate.reached.is_set() and len(queue) == 0)
        waiting = [asyncio.create_task(select_async(swiglu())) for _ in range(8)]
        await until(lambda: len(queue) == 8)
        for _ in range(5):
            with pytest.raises(QueueFullError, match="8 selections are waiting"):
                await select_async(swiglu())
        # Urgent ones are refused as well: what was taken is served.
        with pytest.raises(QueueFullError):
            await select_async(swiglu(), priority=-1)
        assert len(queue) == 8
        assert lz.stats()["selections_rejected"] == rejected + 6
        # Others are as free to select as before.
        gate.opened.set()
        await asyncio.gather(*running, *waiting)
        assert (await select_async(swiglu())).kernel_id == lz.select(swiglu()).kernel_id

    run(main())
    assert lz.stats()["selections_rejected"] == rejected + 6


@pytest.mark.scenario("PS-034")
@pytest.mark.scenario("CS-035")
def test_cancelled_selections_hold_no_place(gate: GatedPolicy, put_queue: Callable[..., SelectionQueue]) -> None:
    queue = put_queue(capacity=3)
    busy(queue, gate)
    for _ in range(100):
        futures = [queue.submit(swiglu(), priority) for priority in range(3)]
        with pytest.raises(QueueFullError):
            queue.submit(swiglu())
        assert all(future.cancel() for future in futures)
    assert len(queue) == 0
    last = [queue.submit(swiglu()) for _ in range(3)]
    gate.opened.set()
    assert len({future.result(LONG_S).kernel_id for future in last}) == 1


def test_errors_reach_who_awaits_and_keep_nothing_alive(put_queue: Callable[..., SelectionQueue]) -> None:
    queue = put_queue()

    async def main() -> None:
        unknown = SelectionContext(operation="mlp.gelu", dtype="float32", rows=1, hidden_size=1)
        with pytest.raises(ContextError, match=r"operation is 'mlp\.gelu'"):
            await select_async(unknown)
        impossible = SelectionContext(operation="norm.rms", dtype="int8", rows=1, hidden_size=1)
        with pytest.raises(NoKernelAvailableError, match="no kernel accepts this call"):
            await select_async(impossible)
        # The worker has outlived them.
        assert (await select_async(swiglu())).kernel_id

    run(main())
    gc.collect()
    gc.disable()
    try:
        future = queue.submit(SelectionContext(operation="mlp.gelu", dtype="float32", rows=1, hidden_size=1))
        assert isinstance(future.exception(LONG_S), ContextError)
        reference = weakref.ref(future)
        wait([queue.submit(swiglu())], LONG_S)  # the worker is done with the one before
        del future
        # Without a cycle, it goes without the collector.
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.scenario("FS-026")
def test_workers_end_when_idle_and_start_again(put_queue: Callable[..., SelectionQueue]) -> None:
    queue = put_queue(workers=2)

    def workers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "layerzero-select"]

    before = set(workers())
    for _ in range(2):
        wait([queue.submit(swiglu(rows)) for rows in range(1, 50)], LONG_S)
        started = set(workers()) - before
        assert len(started) <= 2
        for thread in started:
            thread.join(LONG_S)
        assert set(workers()) <= before
        assert (queue._running, queue._idle) == (0, 0)


@pytest.mark.scenario("FS-026")
def test_without_a_thread_to_be_had_a_selection_is_refused_and_not_forgotten_in_the_queue(
    put_queue: Callable[..., SelectionQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = put_queue()

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(QueueFullError, match="can't start new thread"):
            queue.submit(swiglu())
    assert len(queue) == 0
    assert queue.submit(swiglu()).result(LONG_S).kernel_id == lz.select(swiglu()).kernel_id


def test_a_forked_process_selects_with_workers_of_its_own() -> None:
    code = """
import asyncio, os
import layerzero_runtime as lz
context = lz.SelectionContext(operation="mlp.swiglu", dtype="float32", rows=4, hidden_size=64)
async def main():
    plan = await asyncio.wait_for(lz.select_async(context), 30)
    print(plan.kernel_id, flush=True)
asyncio.run(main())
child = os.fork()
if child == 0:
    asyncio.run(main())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ,
        timeout=LONG_S,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
