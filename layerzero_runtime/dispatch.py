"""The published snapshot, and selection through it."""

from __future__ import annotations

import threading

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot

_build_lock = threading.Lock()
_counters = CounterGroup()
_snapshot: Snapshot | None = None


def current_snapshot() -> Snapshot:
    """The snapshot in force, built at the first selection."""
    snapshot = _snapshot
    return publish_snapshot(only_if_none=True) if snapshot is None else snapshot


def publish_snapshot(*, only_if_none: bool = False) -> Snapshot:
    """Build a snapshot from the tables and kernels as they are now, and publish it."""
    global _snapshot
    with _build_lock:
        if _snapshot is None or not only_if_none:
            _snapshot = Snapshot(Registry(builtin_kernels()), _counters)
        return _snapshot


def select(context: SelectionContext) -> ExecutionPlan:
    """The plan for a described call; without a device in the context, for the detected one.

    Raises:
        ContextError: the operation is unknown or a size is missing.
        NoKernelAvailableError: no registered kernel accepts the context.
    """
    if context.device is None:
        context = context.with_device(detect_device())
    return current_snapshot().select(context)


def stats() -> dict[str, int]:
    """Counters by name: `calls`, `hits`, `misses`, `intercepted`, `empty`, `fallbacks`, and those that were raised.

    Hits and misses are of the snapshot in force.
    """
    calls, misses = (0, 0) if _snapshot is None else _snapshot.count_calls()
    usual = {"intercepted": 0, "empty": 0, "fallbacks": 0}
    return {"calls": calls, "hits": calls - misses, "misses": misses} | usual | dict(_counters)
