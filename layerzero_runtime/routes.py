"""`Route`: from the sizes of a call to the function that serves it, for one combination of static features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import Counter, log_warning
from layerzero_runtime.errors import KernelExecutionError
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.live_selector import select_live
from layerzero_runtime.operation import Operation
from layerzero_runtime.table import MISS, Table, TableEntry, TableStep
from layerzero_runtime.tensors import FIELD_READERS

if TYPE_CHECKING:
    from layerzero_runtime.snapshot import Snapshot


class Route:
    """Serve a call with `route.functions[route.decide(*sizes)](*arguments)`.

    `functions` has one function per leaf and the miss last, where MISS (-1) finds it. A leaf's function prepares its
    plan on the first call and then replaces itself; where a leaf has guards, it checks them on every call.
    """

    __slots__ = ("_features", "_operation", "_snapshot", "_table", "calls", "decide", "functions", "misses")

    def __init__(
        self,
        snapshot: Snapshot,
        operation: Operation,
        features: Mapping[str, Any],
        table: Table | None,
        entry: TableEntry | None,
        counters: tuple[Counter, Counter] | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._operation = operation
        self._features = features
        self._table = table
        self.calls, self.misses = counters or (Counter(), Counter())
        leaves = () if entry is None else entry.leaves
        self.decide: Callable[..., int] = _always_miss if entry is None else entry.decide
        self.functions: list[KernelFunction] = [self._first_use(index, chain) for index, chain in enumerate(leaves)]
        self.functions.append(self._miss)

    def _describe(self, arguments: tuple[Any, ...]) -> SelectionContext:
        return self._operation.describe(*arguments, **self._features)

    def _first_use(self, leaf: int, chain: tuple[TableStep, ...]) -> KernelFunction:
        def first_use(*arguments: Any) -> Any:
            self.functions[leaf] = function = self._leaf_function(chain, self._describe(arguments))
            return function(*arguments)

        return first_use

    def _leaf_function(self, chain: tuple[TableStep, ...], context: SelectionContext) -> KernelFunction:
        """The chain of a leaf with its kernels loaded; steps that are stale or fail to load give way to the next."""
        steps: list[tuple[TableStep, KernelFunction]] = []
        for step in chain:
            assert self._table is not None
            kernel = self._snapshot.usable_kernel(self._table, step)
            if kernel is None:
                continue
            try:
                function = self._snapshot.prepare(kernel, step.configuration, self._operation, context)
            except KernelExecutionError:
                self._snapshot.counters.raise_by_one("fallbacks")
                continue
            if not step.guards and not steps:
                return function
            steps.append((step, function))
            if not step.guards:
                break
        if not steps:
            return self._miss
        return self._guarded(tuple(steps))

    def _guarded(self, steps: tuple[tuple[TableStep, KernelFunction], ...]) -> KernelFunction:
        fields = {limit.field for step, _ in steps for limit in step.guards}
        if fields <= FIELD_READERS.keys():
            return self._guarded_by_tensors(steps)

        def guarded(*arguments: Any) -> Any:
            context = self._describe(arguments)
            for step, function in steps:
                if step.accepts(context):
                    return function(*arguments)
            return self._miss(*arguments)

        return guarded

    def _guarded_by_tensors(self, steps: tuple[tuple[TableStep, KernelFunction], ...]) -> KernelFunction:
        """The same without describing the call: its guards read strides alone."""
        checks = tuple(
            (tuple((FIELD_READERS[limit.field], limit.accepts) for limit in step.guards), function)
            for step, function in steps
        )

        def guarded(*arguments: Any) -> Any:
            tensors = [argument for argument in arguments if hasattr(argument, "stride")]
            for guards, function in checks:
                if all(accepts(read(tensors)) for read, accepts in guards):
                    return function(*arguments)
            return self._miss(*arguments)

        return guarded

    def _miss(self, *arguments: Any) -> Any:
        context = self._describe(arguments)
        if self.misses.raise_by_one() == 0:
            self._log_first_miss(context)
        return serve_live(self._snapshot, self._operation, context)(*arguments)

    def _log_first_miss(self, context: SelectionContext) -> None:
        import json

        reason = self._snapshot.select(context).miss_reason or "the plans of the entry failed to load"
        log_warning(
            f"first miss of its kind: {reason}; {select_live(self._snapshot.registry, context).kernel_id} serves. "
            f"To cover it, add this line to a workload and tune: {json.dumps(context.to_dict())}"
        )


def serve_live(snapshot: Snapshot, operation: Operation, context: SelectionContext) -> KernelFunction:
    """The function that the live selector chooses; one that fails to load gives way to the default, counted.

    Raises:
        NoKernelAvailableError: no kernel is legal.
        KernelExecutionError: the default itself cannot be loaded.
    """
    kernel = select_live(snapshot.registry, context)
    try:
        return snapshot.prepare(kernel, {}, operation, context)
    except KernelExecutionError:
        default = snapshot.registry.get(operation.default_kernel)
        if default is None or default is kernel:
            raise
        snapshot.counters.raise_by_one("fallbacks")
        return snapshot.prepare(default, {}, operation, context)


def _always_miss(*sizes: int) -> int:
    return MISS
