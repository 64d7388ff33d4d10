"""`Snapshot`: all that selection depends on, built aside and published by one assignment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CallCounters, CounterGroup, log_warning
from layerzero_runtime.errors import KernelExecutionError, NoKernelAvailableError
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_runtime.policies.policy import EMPTY, Policy
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.selection.selector import Selector
from layerzero_runtime.serving.execution import STATE, is_capturing
from layerzero_runtime.serving.health import Health
from layerzero_runtime.serving.prepared import PreparedKernel, PreparedKernels
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.recovery import FailedInstead
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.serving.seen_calls import SeenCalls
from layerzero_runtime.tables.table import TableEntry
from layerzero_runtime.tables.table_set import TableSet

if TYPE_CHECKING:
    from layerzero_runtime.serving.verification import Verification
    from layerzero_runtime.serving.workload_recorder import WorkloadRecorder

# Distinct static features are few in a process; beyond this a route is built for each call instead of being kept.
MAX_ROUTES = 4096
# What every static key fixes beside the operation's own features.
KEY_FIELDS = frozenset({"operation", "mode", "dtype", "platform", "sm", "instruction_set"})


class Snapshot(Selector):
    """Registry, tables, policy and health at one moment. What is derived from them lives and dies with it; loaded
    tables and prepared kernels depend on neither policy nor health and are shared with the snapshots around it.

    Attributes:
        half_open: kernels of which one call at a time finds out whether they work again.
        seen: what the public functions have served under it.
    """

    def __init__(
        self,
        registry: Registry,
        counters: CounterGroup,
        *,
        policy: Policy = EMPTY,
        health: Health | None = None,
        tables: TableSet | None = None,
        prepared: PreparedKernels | None = None,
        calls: CallCounters | None = None,
        verification: Verification | None = None,
        recorder: WorkloadRecorder | None = None,
    ) -> None:
        self.health = health or Health(lambda: None)
        super().__init__(registry, counters, policy, self.health.broken, tables or TableSet(counters))
        self.half_open = self.health.half_open
        self.verification = verification
        self.recorder = recorder
        self.seen = SeenCalls()
        self._prepared = prepared or PreparedKernels()
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._calls = calls or CallCounters(MAX_ROUTES)

    def prepare(self, choice: Choice, operation: Operation, context: SelectionContext) -> PreparedKernel:
        """The choice's kernel for the context's static features, loaded once.

        Raises:
            KernelExecutionError: its library is missing or loading it failed.
        """
        return self._prepared.prepare(choice.kernel, choice.configuration, operation, context, densify=choice.densify)

    def is_ready(self, choice: Choice, operation: Operation, context: SelectionContext) -> bool:
        """Whether a choice may serve a call here and now: one that has to be prepared first may not under capture of a
        graph, nor where it compiles and only `warmup` prepares."""
        if not choice.kernel.spec.compiles and not PUBLISHED.special:
            return True
        if self._prepared.is_proven(choice.kernel, choice.configuration, operation, context, densify=choice.densify):
            return True
        if choice.kernel.spec.compiles and STATE.preparation == "warmup":
            return False
        return not (PUBLISHED.special and is_capturing())

    def stand_in(self, choice: Choice, operation: Operation, context: SelectionContext) -> Choice:
        """What serves in place of a choice that is not ready, counted: the default, where that may serve."""
        self.count_unprepared(choice)
        default = self.default_of(operation, context)
        if default is not None:
            return default
        try:
            return self.choose(operation, context, without=(choice.kernel.kernel_id,), to_run=True).choice
        except NoKernelAvailableError:
            return choice

    def count_unprepared(self, choice: Choice) -> None:
        """Count a call that something else serves because the choice is not ready, and log the first."""
        if self.counters.raise_by_one("unprepared") == 0:
            log_warning(
                f"{choice.kernel.kernel_id} has to be prepared before it serves; the default serves until "
                "layerzero_runtime.warmup(contexts) has done so, or call preparation('on_first_use') in a script"
            )

    def default_of(self, operation: Operation, context: SelectionContext) -> Choice | None:
        """The default, where it may serve the call."""
        default = self.registry.get(operation.default_kernel)
        return None if default is None or self.live.refusals(default, context) else Choice(default, {})

    def serve(
        self,
        choice: Choice,
        operation: Operation,
        context: SelectionContext,
        arguments: tuple[Any, ...],
        without: Collection[str] = frozenset(),
    ) -> Any:
        """Prepare and run a choice. While one call tries a half-open kernel, the others get the next best that is not
        among `without`, and the half-open one only where there is none.

        Raises:
            FailedInstead: such a next best raised.
        """
        if not self.is_ready(choice, operation, context):
            choice = self.stand_in(choice, operation, context)
        kernel_id = choice.kernel.kernel_id
        if kernel_id not in self.half_open:
            return self.run(self.prepare(choice, operation, context), operation, context, arguments)
        if not self.health.begin_probe(kernel_id):
            without = {*without, kernel_id}
            try:
                instead = self.choose(operation, context, without=without, to_run=True).choice
            except NoKernelAvailableError:
                return self.run(self.prepare(choice, operation, context), operation, context, arguments)
            try:
                return self.run(self.prepare(instead, operation, context), operation, context, arguments)
            except Exception as error:
                raise FailedInstead(instead, without, error) from error
        try:
            return self.run(self.prepare(choice, operation, context), operation, context, arguments)
        finally:
            self.health.end_probe(kernel_id)

    def run(
        self, prepared: PreparedKernel, operation: Operation, context: SelectionContext, arguments: tuple[Any, ...]
    ) -> Any:
        """Call a prepared kernel for a described call; one that was half-open works again."""
        result = prepared.run(context, arguments)
        if prepared.kernel.kernel_id in self.half_open:
            self.health.succeeded(prepared.kernel.kernel_id)
        if self.verification is not None:
            return self.verification.verify(prepared.kernel.kernel_id, operation, context, arguments, result)
        return result

    def instrumented(self, prepared: PreparedKernel, route: Route) -> KernelFunction:
        """The kernel's function for a leaf; with verification, or with hits recorded, described at every call."""
        recorder = self.recorder if self.recorder is not None and self.recorder.records_hits else None
        if self.verification is None and recorder is None:
            if prepared.proven:
                return prepared.function

            def proving(*arguments: Any) -> Any:
                if prepared.proven:
                    return prepared.function(*arguments)
                return self.run(prepared, route.operation, route.describe(arguments), arguments)

            return proving

        def described(*arguments: Any) -> Any:
            context = route.describe(arguments)
            if recorder is not None:
                recorder.record(context)
            return self.run(prepared, route.operation, context, arguments)

        return described

    def record_miss(self, context: SelectionContext) -> None:
        if self.recorder is not None:
            self.recorder.record(context)

    def record_hit(self, context: SelectionContext) -> None:
        if self.recorder is not None and self.recorder.records_hits:
            self.recorder.record(context)

    def route(self, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> Route:
        """The route of the context's static features; `features` are what `operation.describe` takes by keyword."""
        assert context.device is not None
        key = (context.device, operation.name, operation.static_key(context))
        route = self._routes.get(key)
        if route is None:
            table = self.tables.of(context.device)
            entry: TableEntry | None = None
            if table is not None:
                entry = table.entries.get(operation.name, {}).get(operation.static_key(context))
            if entry is not None and self.tables.is_damaged(entry):
                entry = None
            known = KEY_FIELDS.union(operation.static, operation.plain, operation.fixed)
            is_governed = self.policy.relevance(context, known) != "none"
            route = Route(self, operation, dict(features), table, entry, is_governed, self._calls.of(key))
            if len(self._routes) < MAX_ROUTES:
                route = self._routes.setdefault(key, route)
        return route

    def default(self, operation: Operation, features: Mapping[str, Any]) -> PreparedKernel:
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
        return self.prepare(Choice(kernel, {}), operation, context)

    @property
    def digest_parts(self) -> Mapping[str, str]:
        """By name, what selections follow from: kernels, policy, broken, table, device, libraries."""
        from layerzero_runtime.digest import digest_parts

        return digest_parts(self)

    @property
    def digest(self) -> str:
        """Equal in processes that select alike: a hash over `digest_parts`."""
        from layerzero_runtime.digest import digest_of

        return digest_of(self.digest_parts)
