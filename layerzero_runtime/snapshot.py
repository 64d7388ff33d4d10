"""`Snapshot`: all that selection depends on, built aside and published by one assignment."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from layerzero_runtime.classes import ContextClasses
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CallCounters, CounterGroup, log_warning
from layerzero_runtime.errors import KernelExecutionError, NoKernelAvailableError, TableError
from layerzero_runtime.health import Health
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.live_cache import LiveCache
from layerzero_runtime.live_selector import Choice, LiveSelector, Ranking, no_kernel_error
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.policy import EMPTY, Policy
from layerzero_runtime.prepared import PreparedKernel, PreparedKernels
from layerzero_runtime.prior import NearestBuckets, Prior
from layerzero_runtime.recovery import FailedInstead
from layerzero_runtime.registry import Registry
from layerzero_runtime.routes import Route
from layerzero_runtime.table import MISS, Table, TableEntry, TableStep
from layerzero_runtime.table_set import TableSet
from layerzero_runtime.transforms import transforms_of
from layerzero_runtime.verification import Verification
from layerzero_runtime.workload_recorder import WorkloadRecorder

# Distinct static features are few in a process; beyond this a route is built for each call instead of being kept.
MAX_ROUTES = 4096
# What every static key fixes beside the operation's own features.
KEY_FIELDS = frozenset({"operation", "mode", "dtype", "platform", "sm", "instruction_set"})


@dataclass(frozen=True, slots=True)
class Selection:
    """What serves a context: a choice, where it comes from, and for `explain` the reason of a miss."""

    choice: Choice
    source: Literal["table", "live"]
    available: bool = True
    cached: bool = False
    entry: tuple[tuple[Any, ...], int] | None = None
    miss_reason: str | None = None


class Snapshot:
    """Registry, tables, policy and health at one moment. What is derived from them lives and dies with it; loaded
    tables and prepared kernels depend on neither policy nor health and are shared with the snapshots around it.

    Attributes:
        broken: breakers of the kernels that serve no call in this snapshot.
        half_open: kernels of which one call at a time finds out whether they work again.
        fast_routes: routes by the keys that the public functions build from tensors.
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
        self.registry = registry
        self.counters = counters
        self.policy = policy
        self.health = health or Health(lambda: None)
        self.broken = self.health.broken
        self.half_open = self.health.half_open
        self.tables = tables or TableSet(counters)
        self.verification = verification
        self.recorder = recorder
        self.fast_routes: dict[tuple[Any, ...], Route] = {}
        self.live = LiveSelector(registry, policy, self.broken)
        self.live_cache: LiveCache[Ranking] = LiveCache()
        self._prepared = prepared or PreparedKernels()
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._classes: dict[str, ContextClasses] = {}
        self._calls = calls or CallCounters(MAX_ROUTES)

    def select(self, context: SelectionContext) -> ExecutionPlan:
        """The plan for a context whose device is known.

        Raises:
            ContextError: the operation is unknown or a size is missing.
            NoKernelAvailableError: no registered kernel accepts the context.
        """
        operation = operation_named(context.operation)
        operation.validate(context)
        selection = self.choose(operation, context)
        assert context.device is not None
        table = self.tables.of(context.device)
        spec = selection.choice.kernel.spec
        transforms = transforms_of(spec, context, densify=selection.choice.densify)
        missing = None if selection.available else self.live.missing(selection.choice.kernel)
        return ExecutionPlan(
            operation=operation.name,
            kernel_id=spec.kernel_id,
            configuration=selection.choice.configuration,
            pre_transforms=transforms.pre,
            post_transforms=transforms.post,
            source=selection.source,
            cached=selection.cached,
            available=missing is None,
            unavailable_reason=missing,
            table=None if table is None else table.name,
            entry=selection.entry,
            miss_reason=selection.miss_reason,
        )

    def choose(
        self,
        operation: Operation,
        context: SelectionContext,
        *,
        without: Collection[str] = frozenset(),
        to_run: bool = False,
    ) -> Selection:
        """What serves a valid context.

        Args:
            without: kernels that have just failed on this very call.
            to_run: leave out kernels whose library is missing, which answer for described calls only.

        Raises:
            NoKernelAvailableError: no registered kernel accepts the context.
        """
        assert context.device is not None
        table = self.tables.of(context.device)
        leaf, reason = MISS, ""
        if table is None:
            reason = f"no table for device {context.device.slug}"
        else:
            entry, leaf = table.find(operation, context)
            if entry is None:
                reason = f"not measured: {operation.name} with {operation.static_key(context)}"
            elif leaf == MISS:
                reason = f"outside the measured range: {operation.name} with {operation.sizes(context)}"
            elif (rule := self.policy.overrules_measurement(context)) is not None:
                reason = f"a policy rule decides: {rule}"
            else:
                for step in entry.leaves[leaf]:
                    kernel = self.usable_kernel(table, step)
                    if kernel is None or kernel.kernel_id in without or not step.accepts(context):
                        continue
                    available = self.live.missing(kernel) is None
                    if (available or not to_run) and self.policy.denial(kernel.spec, context) is None:
                        choice = Choice(kernel, step.configuration)
                        return Selection(choice, "table", available, entry=(operation.static_key(context), leaf))
                reason = f"no plan of the entry is legal, current and allowed for this call of {operation.name}"
        ranking, cached = self._ranking(operation, context, table, leaf)
        choices = [choice for choice in ranking.choices if choice.kernel.kernel_id not in without]
        if choices:
            return Selection(choices[0], "live", cached=cached, miss_reason=reason)
        if ranking.unavailable and not ranking.choices and not to_run:
            return Selection(ranking.unavailable[0], "live", False, cached=cached, miss_reason=reason)
        raise no_kernel_error(self.registry, context, ranking)

    def _ranking(
        self, operation: Operation, context: SelectionContext, table: Table | None, leaf: int
    ) -> tuple[Ranking, bool]:
        """The live selector's answer for the context's class, and whether it was there already."""
        static_key = operation.static_key(context)
        nearest: Hashable = leaf if leaf != MISS else NearestBuckets.class_of(operation, context)
        key = (operation.name, context.device, static_key, nearest, self._classes_of(operation).of(context))
        return self.live_cache.get(key, lambda: self.live.rank(context, self._prior(operation, context, table, leaf)))

    def prior_of(self, context: SelectionContext) -> Prior:
        """What the live selector goes by for a context whose device is known."""
        operation = operation_named(context.operation)
        assert context.device is not None
        table = self.tables.of(context.device)
        leaf = MISS if table is None else table.find(operation, context)[1]
        return self._prior(operation, context, table, leaf)

    def _prior(self, operation: Operation, context: SelectionContext, table: Table | None, leaf: int) -> Prior:
        assert context.device is not None
        try:
            if table is not None and leaf != MISS:
                found = self.tables.nearest(table).of_leaf(operation, operation.static_key(context), leaf)
                return self._without_stale(table, found)
            for candidate in self.tables.alike(context.device):
                prior = self._without_stale(candidate, self.tables.nearest(candidate).prior(operation, context))
                if prior.preferences:
                    return prior
        except TableError as error:
            if self.counters.raise_by_one("evidence_damaged") == 0:
                log_warning(f"{error}; misses go by priority alone")
        return Prior()

    def _without_stale(self, table: Table, prior: Prior) -> Prior:
        """What a table prefers, but for kernels that have changed since; of runners-up without entries none is known."""
        kept = tuple(
            (kernel_id, configuration)
            for kernel_id, configuration in prior.preferences
            if kernel_id not in table.kernels
            or not self.tables.is_stale(table, kernel_id, self.registry.get(kernel_id))
        )
        return replace(prior, preferences=kept, bucket=prior.bucket if kept else "")

    def _classes_of(self, operation: Operation) -> ContextClasses:
        classes = self._classes.get(operation.name)
        if classes is None:
            limits = [limit for kernel in self.registry.candidates(operation.name) for limit in kernel.spec.limits]
            classes = ContextClasses((*limits, *self.policy.conditions(operation.name)))
            self._classes[operation.name] = classes
        return classes

    def usable_kernel(self, table: Table, step: TableStep) -> Kernel | None:
        """The kernel of a table's step, None if it is broken, unknown or stale (counted and logged once)."""
        if step.kernel_id in self.broken:
            return None
        kernel = self.registry.get(step.kernel_id)
        return None if self.tables.is_stale(table, step.kernel_id, kernel) else kernel

    def prepare(self, choice: Choice, operation: Operation, context: SelectionContext) -> PreparedKernel:
        """The choice's kernel for the context's static features, loaded once.

        Raises:
            KernelExecutionError: its library is missing or loading it failed.
        """
        return self._prepared.prepare(choice.kernel, choice.configuration, operation, context, densify=choice.densify)

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
