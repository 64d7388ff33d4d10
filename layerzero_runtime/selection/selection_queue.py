"""`select_async`: selections from an event loop through a bounded queue, urgent ones first."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import count, select
from layerzero_runtime.errors import ContextTypeError, QueueFullError
from layerzero_runtime.plan import ExecutionPlan

CAPACITY = 1024
# Selection is Python code under one lock of the interpreter: two threads, so that one that loads a table does not keep
# all others waiting.
WORKERS = 2
# A worker that has had nothing to do for so long ends.
IDLE_SECONDS = 30.0

_Job = tuple["Future[ExecutionPlan]", SelectionContext]


class SelectionQueue:
    """Waiting selections, the lowest priority number first, in order of arrival among equals.

    Only what waits counts against the capacity: what a worker has begun has left the queue, and so has what was
    cancelled. Workers are started as they are needed.
    """

    def __init__(self, capacity: int = CAPACITY, workers: int = WORKERS, idle_s: float = IDLE_SECONDS) -> None:
        self._capacity = capacity
        self._workers = workers
        self._idle_s = idle_s
        # Guards all that follows.
        self._changed = threading.Condition()
        # By priority. What is cancelled is taken out at once, wherever it stands.
        self._lanes: dict[int, OrderedDict[Future[ExecutionPlan], SelectionContext]] = {}
        self._waiting = 0
        self._running = 0
        self._idle = 0

    def submit(self, context: SelectionContext, priority: int = 0) -> Future[ExecutionPlan]:
        """A future of the context's plan.

        Raises:
            QueueFullError: as many selections wait as the queue holds, or the system gives no thread to serve them.
            ContextTypeError: the priority is no integer.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ContextTypeError(f"priority must be an integer, not {priority!r}")
        future: Future[ExecutionPlan] = Future()
        with self._changed:
            is_taken = self._waiting < self._capacity
            if is_taken:
                self._lanes.setdefault(priority, OrderedDict())[future] = context
                self._waiting += 1
                self._changed.notify()
            is_short = is_taken and self._waiting > self._idle and self._running < self._workers
            self._running += is_short
        if not is_taken:
            count("selections_rejected")
            raise QueueFullError(
                f"{self._capacity} selections are waiting, no more are taken; await some of them first, or use select()"
            )
        if is_short:
            self._start_worker(future)
        future.add_done_callback(self._forget_cancelled)
        return future

    def __len__(self) -> int:
        return self._waiting

    def _start_worker(self, future: Future[ExecutionPlan]) -> None:
        try:
            threading.Thread(target=self._work, name="layerzero-select", daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            with self._changed:
                self._running -= 1
                if self._running or not self._take_out(future):
                    return  # another worker serves it
            count("selections_rejected")
            raise QueueFullError(f"no thread can be started to select ({error}); use select()") from error

    def _forget_cancelled(self, future: Future[ExecutionPlan]) -> None:
        if future.cancelled():
            with self._changed:
                self._take_out(future)

    def _take_out(self, future: Future[ExecutionPlan]) -> bool:
        """Remove a selection; whether it was waiting."""
        for priority, lane in self._lanes.items():
            if lane.pop(future, None) is not None:
                self._waiting -= 1
                if not lane:
                    del self._lanes[priority]
                return True
        return False

    def _work(self) -> None:
        while (job := self._next()) is not None:
            _serve(*job)
            # Nothing of a job outlives it.
            del job

    def _next(self) -> _Job | None:
        """The most urgent selection, waited for; None when nothing has come for `idle_s`: then this worker is gone."""
        with self._changed:
            while not self._waiting:
                self._idle += 1
                came = self._changed.wait(self._idle_s)
                self._idle -= 1
                if not came and not self._waiting:
                    self._running -= 1
                    return None
            priority = min(self._lanes)
            lane = self._lanes[priority]
            job = lane.popitem(last=False)
            self._waiting -= 1
            if not lane:
                del self._lanes[priority]
            return job


def _serve(future: Future[ExecutionPlan], context: SelectionContext) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(select(context))
    except BaseException as error:  # noqa: BLE001 - it is the caller's, who awaits it
        future.set_exception(error)
    finally:
        # The error's traceback keeps this frame: without this, it and the future would keep each other.
        del future, context


_queue = SelectionQueue()


def _renew_queue() -> None:
    global _queue
    _queue = SelectionQueue()


# The workers do not live on in a forked process, and the lock may have been held.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_queue)


async def select_async(context: SelectionContext, priority: int = 0) -> ExecutionPlan:
    """`select` without blocking the event loop. Lower numbers of `priority` go first. A task that is cancelled takes
    its selection out of the queue.

    Raises:
        QueueFullError: as many selections wait as the queue holds.
        ContextError, NoKernelAvailableError: as `select`.
    """
    return await asyncio.wrap_future(_queue.submit(context, priority))
