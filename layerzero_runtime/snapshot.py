"""`Snapshot`: all that selection depends on, built aside and published by one assignment."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import Counter, CounterGroup, log_warning
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import KernelExecutionError
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.layout import adapt_layout
from layerzero_runtime.live_selector import select_live
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.registry import Registry
from layerzero_runtime.routes import Route
from layerzero_runtime.staleness import stale_reason
from layerzero_runtime.table import MISS, Table, TableEntry, TableStep
from layerzero_runtime.table_files import find_table

# Distinct static features are few in a process; beyond this a route is built for each call instead of being kept.
MAX_ROUTES = 4096


class Snapshot:
    """Registry and tables at one moment. What is derived from them (routes, prepared kernels) lives and dies with it.

    Attributes:
        fast_routes: routes by the keys that the public functions build from tensors.
    """

    def __init__(self, registry: Registry, counters: CounterGroup) -> None:
        self.registry = registry
        self.counters = counters
        self.fast_routes: dict[tuple[Any, ...], Route] = {}
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._tables: dict[DeviceSpec, Table | None] = {}
        self._prepared: dict[tuple[Any, ...], KernelFunction] = {}
        self._failed: dict[tuple[Any, ...], str] = {}
        self._stale: dict[tuple[str, str], str | None] = {}
        # What threads find out together is counted and logged once.
        self._lock = threading.Lock()
        self._prepare_lock = threading.Lock()
        # Of all routes that were not kept.
        self._other_calls, self._other_misses = Counter(), Counter()

    def table_for(self, device: DeviceSpec) -> Table | None:
        """The table of the device, None without one; tables that cannot be used are counted and logged once."""
        if device not in self._tables:
            with self._lock:
                if device not in self._tables:
                    table, skipped = find_table(device)
                    for error in skipped:
                        self.counters.raise_by_one("tables_skipped")
                        log_warning(f"a table was skipped: {error}")
                    self._tables[device] = table
        return self._tables[device]

    def select(self, context: SelectionContext) -> ExecutionPlan:
        """The plan for a context whose device is known.

        Raises:
            ContextError: the operation is unknown or a size is missing.
            NoKernelAvailableError: no registered kernel accepts the context.
        """
        operation = operation_named(context.operation)
        operation.validate(context)
        assert context.device is not None
        table = self.table_for(context.device)
        found = self._find_step(table, operation, context)
        if isinstance(found, str):
            kernel = select_live(self.registry, context)
            return self._plan(kernel, context, source="live", table=table, miss_reason=found)
        kernel, step, leaf = found
        key = operation.static_key(context)
        return self._plan(
            kernel, context, source="table", table=table, configuration=step.configuration, entry=(key, leaf)
        )

    def _find_step(
        self, table: Table | None, operation: Operation, context: SelectionContext
    ) -> tuple[Kernel, TableStep, int] | str:
        """The kernel, step and leaf that the table gives, or the reason of the miss."""
        if table is None:
            assert context.device is not None
            return f"no table for device {context.device.slug}"
        entry, leaf = table.find(operation, context)
        if entry is None:
            return f"not measured: {operation.name} with {operation.static_key(context)}"
        if leaf == MISS:
            return f"outside the measured range: {operation.name} with {operation.sizes(context)}"
        for step in entry.leaves[leaf]:
            kernel = self.usable_kernel(table, step)
            if kernel is not None and step.accepts(context):
                return kernel, step, leaf
        return f"no plan of the entry is legal and current for this call of {operation.name}"

    def _plan(
        self,
        kernel: Kernel,
        context: SelectionContext,
        *,
        table: Table | None,
        configuration: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> ExecutionPlan:
        from layerzero_runtime.libraries import missing_requirement

        missing = missing_requirement(kernel.spec.requires)
        return ExecutionPlan(
            operation=context.operation,
            kernel_id=kernel.kernel_id,
            configuration=configuration or {},
            available=missing is None,
            unavailable_reason=missing,
            table=None if table is None else table.name,
            **rest,
        )

    def usable_kernel(self, table: Table, step: TableStep) -> Kernel | None:
        """The registered kernel of a table's step, None (counted and logged once) if it is unknown or stale."""
        kernel = self.registry.get(step.kernel_id)
        key = (table.name, step.kernel_id)
        if key not in self._stale:
            with self._lock:
                if key not in self._stale:
                    reason = f"{step.kernel_id} is not registered" if kernel is None else stale_reason(table, kernel)
                    if reason is not None:
                        self.counters.raise_by_one("stale_kernels")
                        log_warning(f"entries of {table.name} are not used: {reason}; tune again to renew them")
                    self._stale[key] = reason
        return None if self._stale[key] else kernel

    def prepare(
        self, kernel: Kernel, configuration: Mapping[str, Any], operation: Operation, context: SelectionContext
    ) -> KernelFunction:
        """The function of a kernel for the context's static features, loaded once; a failure is kept and logged once.

        Raises:
            KernelExecutionError: its library is missing or loading it failed.
        """
        # A configuration may hold lists, and 1 and True are one key; their texts are neither unhashable nor equal.
        configured = repr(sorted(configuration.items()))
        key = (kernel.kernel_id, configured, context.device, operation.name, operation.static_key(context))
        function = self._prepared.get(key)
        if function is not None:
            return function
        with self._prepare_lock:
            if key not in self._prepared and key not in self._failed:
                try:
                    self._prepared[key] = _load(kernel, configuration, context)
                except KernelExecutionError as error:
                    self._failed[key] = str(error)
                    log_warning(f"{error}; another kernel serves where there is one")
                    raise
        if key in self._failed:
            raise KernelExecutionError(self._failed[key])
        return self._prepared[key]

    def route(self, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> Route:
        """The route of the context's static features; `features` are what `operation.describe` takes by keyword."""
        assert context.device is not None
        key = (context.device, operation.name, operation.static_key(context))
        route = self._routes.get(key)
        if route is None:
            table = self.table_for(context.device)
            entry: TableEntry | None = None
            if table is not None:
                entry = table.entries.get(operation.name, {}).get(operation.static_key(context))
            if len(self._routes) >= MAX_ROUTES:
                counters = self._other_calls, self._other_misses
                return Route(self, operation, dict(features), table, entry, counters)
            # Of two threads that both make one, one wins and both use it: else the calls of the other were not counted.
            route = self._routes.setdefault(key, Route(self, operation, dict(features), table, entry))
        return route

    def default(self, operation: Operation, features: Mapping[str, Any]) -> KernelFunction:
        """The operation's default, for calls that cannot be described; `features` as for `route`.

        Raises:
            KernelExecutionError: the default is not registered, or its library is missing.
        """
        kernel = self.registry.get(operation.default_kernel)
        if kernel is None:
            raise KernelExecutionError(
                f"{operation.default_kernel}, the default of {operation.name}, is not registered"
            )
        context = SelectionContext(operation=operation.name, dtype="float32", **features)
        return self.prepare(kernel, {}, operation, context)

    def count_calls(self) -> tuple[int, int]:
        """(calls, misses) so far."""
        routes = tuple(self._routes.values())
        # Misses first: a call is counted before its miss, so that the two stay in order while other threads count.
        misses = self._other_misses.value + sum(route.misses.value for route in routes)
        return self._other_calls.value + sum(route.calls.value for route in routes), misses


def _load(kernel: Kernel, configuration: Mapping[str, Any], context: SelectionContext) -> KernelFunction:
    from layerzero_runtime.libraries import missing_requirement

    missing = missing_requirement(kernel.spec.requires)
    if missing is not None:
        raise KernelExecutionError(f"{kernel.kernel_id} cannot be loaded: {missing}")
    try:
        return adapt_layout(kernel.load(context, configuration), kernel.spec, context)
    except Exception as error:
        raise KernelExecutionError(f"{kernel.kernel_id} failed to load: {type(error).__name__}: {error}") from error
