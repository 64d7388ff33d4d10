"""`Selector`: which kernel serves a context, from tables first, else from the live selector."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup, log_warning
from layerzero_runtime.errors import TableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.classes import ContextClasses
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.selection.live_selector import Choice, LiveSelector, Ranking, no_kernel_error
from layerzero_runtime.selection.transforms import transforms_of
from layerzero_runtime.serving.health import Breaker
from layerzero_runtime.tables.prior import NearestBuckets, Prior
from layerzero_runtime.tables.table import MISS, Table, TableStep
from layerzero_runtime.tables.table_set import TableSet


@dataclass(frozen=True, slots=True)
class Selection:
    """What serves a context: a choice, where it comes from, and for `explain` the reason of a miss."""

    choice: Choice
    source: Literal["table", "live"]
    available: bool = True
    cached: bool = False
    entry: tuple[tuple[Any, ...], int] | None = None
    miss_reason: str | None = None


class Selector:
    """Registry, tables, policy and broken kernels at one moment, and what they select.

    Attributes:
        broken: breakers of the kernels that serve no call now.
        live: the live selector; `live_cache` holds its answers.
    """

    def __init__(
        self,
        registry: Registry,
        counters: CounterGroup,
        policy: Policy,
        broken: Mapping[str, Breaker],
        tables: TableSet,
    ) -> None:
        self.registry = registry
        self.counters = counters
        self.policy = policy
        self.broken = broken
        self.tables = tables
        self.live = LiveSelector(registry, policy, broken)
        self.live_cache: LiveCache[Ranking] = LiveCache()
        self._classes: dict[str, ContextClasses] = {}

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
            elif self.tables.is_damaged(entry):
                reason, leaf = f"the entry is damaged: {operation.name} with {operation.static_key(context)}", MISS
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
        """What a table prefers, but for kernels that have changed; of runners-up without entries none is known."""
        kept = tuple(
            (kernel_id, configuration)
            for kernel_id, configuration in prior.preferences
            if kernel_id not in table.kernels or self.tables.current_kernel(table, kernel_id, self.registry) is not None
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
        return self.tables.current_kernel(table, step.kernel_id, self.registry)
