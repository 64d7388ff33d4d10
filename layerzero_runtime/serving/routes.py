"""`Route`: from the sizes of a call to the function that serves it, for one combination of static features."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import Counter, log_warning
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.stride_guards import guarded_by_strides
from layerzero_runtime.tables.table import MISS, Table, TableEntry, TableStep
from layerzero_runtime.tensors import FIELD_READERS, call_key

if TYPE_CHECKING:
    from layerzero_runtime.selection.selector import Selection
    from layerzero_runtime.snapshot import Snapshot

# Of a route, how many calls that no leaf serves are remembered: those of the layers of a model repeat each other's.
MAX_SETTLED = 1024


class Route:
    """Serve a call with `route.functions[route.decide(*sizes)](*arguments)`.

    `functions` has one function per leaf and the miss last, where MISS (-1) finds it. A leaf's function prepares its
    plan on the first call and then replaces itself; where a leaf has guards, it checks them on every call. A miss is
    described and selected by itself, as is every call where rules of the policy bear on the route's (`is_governed`);
    what served it serves all calls like it from then on.

    What a function raises is for `recover` to judge.
    """

    __slots__ = (
        "_features",
        "_guarded_steps",
        "_settled",
        "_snapshot",
        "_table",
        "calls",
        "count_call",
        "decide",
        "functions",
        "misses",
        "operation",
    )

    def __init__(
        self,
        snapshot: Snapshot,
        operation: Operation,
        features: Mapping[str, Any],
        table: Table | None,
        entry: TableEntry | None,
        is_governed: bool,
        counters: tuple[Counter, Counter],
    ) -> None:
        self._snapshot = snapshot
        self._features = features
        self._table = table
        self.operation = operation
        # Of each leaf in use that has guards, its steps.
        self._guarded_steps: dict[int, tuple[tuple[TableStep, KernelFunction], ...]] = {}
        # Of calls that were selected by themselves, what serves all that are like them.
        self._settled: dict[Hashable, KernelFunction] = {}
        self.calls, self.misses = counters
        self.count_call = self.calls.raise_by_one
        leaves = () if entry is None or is_governed else entry.leaves
        self.decide: Callable[..., int] = entry.decide if entry is not None and leaves else _always_miss
        self.functions: list[KernelFunction] = [self._first_use(index, chain) for index, chain in enumerate(leaves)]
        self.functions.append(self._described)

    def describe(self, arguments: tuple[Any, ...]) -> SelectionContext:
        return self.operation.describe(*arguments, **self._features)

    def recover(self, error: Exception, arguments: tuple[Any, ...]) -> Any:
        """After a function of this route has raised: the result of another kernel, or an error (`recovery.recover`)."""
        from layerzero_runtime.serving.recovery import recover

        return recover(self._snapshot, self.operation, arguments, self._features, error)

    def settled(self, leaf: int, arguments: tuple[Any, ...]) -> tuple[KernelFunction, bool]:
        """What serves calls of this leaf that have all sizes and strides of these arguments, and whether it depends on
        the strides: the leaf's guards are settled by them."""
        steps = self._guarded_steps.get(leaf)
        if steps is not None:
            context = self.describe(arguments)
            serving = next((function for step, function in steps if step.accepts(context)), None)
            if serving is not None:
                return serving, True
        elif self.functions[leaf] != self._described:
            return self.functions[leaf], False
        return self._settled.get(call_key(arguments), self._described), True

    def _first_use(self, leaf: int, chain: tuple[TableStep, ...]) -> KernelFunction:
        def first_use(*arguments: Any) -> Any:
            context = self.describe(arguments)
            steps = self._steps(chain, context)
            if any(choice.kernel.kernel_id in self._snapshot.half_open for _, choice in steps):
                return self._described(*arguments)
            serving = next((choice for step, choice in steps if step.accepts(context)), None)
            if serving is None:
                result = self._described(*arguments)
            else:
                is_ready = self._is_ready(serving, context)
                result = self._serve_step(serving, context, arguments)
                if not is_ready and PUBLISHED.special and not steps[0][0].guards:  # it may be after the capture
                    return result
            self.functions[leaf] = self._leaf_function(leaf, steps, context)
            return result

        return first_use

    def _steps(self, chain: tuple[TableStep, ...], context: SelectionContext) -> tuple[tuple[TableStep, Choice], ...]:
        """The steps of a leaf that can serve, up to the first without guards."""
        steps: list[tuple[TableStep, Choice]] = []
        for step in chain:
            assert self._table is not None
            kernel = self._snapshot.usable_kernel(self._table, step)
            if kernel is None:
                continue
            if self._snapshot.live.missing(kernel) is not None:
                self._snapshot.counters.raise_by_one("fallbacks")
                continue
            steps.append((step, Choice(kernel, step.configuration)))
            if not step.guards:
                break
        return tuple(steps)

    def _is_ready(self, choice: Choice, context: SelectionContext) -> bool:
        """Whether a step of a leaf may serve here and now; the default, which stands in for what may not, always."""
        return self._is_default(choice) or self._snapshot.is_ready(choice, self.operation, context)

    def _is_default(self, choice: Choice) -> bool:
        return choice.kernel.kernel_id == self.operation.default_kernel and not choice.kernel.spec.compiles

    def _step_function(self, choice: Choice, context: SelectionContext) -> KernelFunction:
        """What serves the calls of a step: its kernel, or while that is not ready what stands in for it, until the next
        snapshot. In graph mode each call asks anew, unless the kernel has served: the next one may be captured."""
        if self._is_ready(choice, context):
            prepared = self._snapshot.prepare(choice, self.operation, context)
            if prepared.proven or not PUBLISHED.special or self._is_default(choice):
                return self._snapshot.instrumented(prepared, self)
        elif not PUBLISHED.special:
            default = self._snapshot.default_of(self.operation, context)
            if default is not None:
                prepared = self._snapshot.prepare(default, self.operation, context)
                return self._counted_as_unprepared(choice, self._snapshot.instrumented(prepared, self))

        return lambda *arguments: self._serve_step(choice, self.describe(arguments), arguments)

    def _serve_step(self, choice: Choice, context: SelectionContext, arguments: tuple[Any, ...]) -> Any:
        """The call by a step's kernel, or by what stands in for it."""
        self._snapshot.record_hit(context)
        if self._is_default(choice):
            return self._snapshot.run(
                self._snapshot.prepare(choice, self.operation, context), self.operation, context, arguments
            )
        return self._snapshot.serve(choice, self.operation, context, arguments)

    def _counted_as_unprepared(self, choice: Choice, function: KernelFunction) -> KernelFunction:
        def unprepared(*arguments: Any) -> Any:
            self._snapshot.count_unprepared(choice)
            return function(*arguments)

        return unprepared

    def _leaf_function(
        self, leaf: int, steps: tuple[tuple[TableStep, Choice], ...], context: SelectionContext
    ) -> KernelFunction:
        if not steps:
            return self._described
        functions = tuple((step, self._step_function(choice, context)) for step, choice in steps)
        if not functions[0][0].guards:
            return functions[0][1]
        self._guarded_steps[leaf] = functions
        if {limit.field for step, _ in steps for limit in step.guards} <= FIELD_READERS.keys():
            guards = [(step.guards, function) for step, function in functions]
            return guarded_by_strides(guards, self._described, len(self.operation.present_tensors(context)))

        def guarded(*arguments: Any) -> Any:
            context = self.describe(arguments)
            for step, function in functions:
                if step.accepts(context):
                    return function(*arguments)
            return self._described(*arguments)

        return guarded

    def _described(self, *arguments: Any) -> Any:
        """Serve a call that has to be selected by itself: a miss, or one that rules of the policy bear on."""
        key = call_key(arguments)
        settled = self._settled.get(key)
        if settled is not None:
            return settled(*arguments)
        context = self.describe(arguments)
        selection = self._snapshot.choose(self.operation, context, to_run=True)
        if selection.source == "live":
            if self.misses.raise_by_one() == 0:
                self._log_first_miss(context, selection.miss_reason, selection.choice.kernel.kernel_id)
            self._snapshot.record_miss(context)
        else:
            self._snapshot.record_hit(context)
        result = self._snapshot.serve(selection.choice, self.operation, context, arguments)
        self._settle(key, selection, context)
        return result

    def _settle(self, key: Hashable, selection: Selection, context: SelectionContext) -> None:
        """Have what served a call serve those like it, unless each of them has to be looked at."""
        snapshot, choice = self._snapshot, selection.choice
        if snapshot.verification is not None or choice.kernel.kernel_id in snapshot.half_open:
            return
        if not snapshot.is_ready(choice, self.operation, context):
            return
        prepared = snapshot.prepare(choice, self.operation, context)
        if not prepared.proven:
            return
        function, is_miss = prepared.function, selection.source == "live"
        record = snapshot.record_miss if is_miss else snapshot.record_hit
        count_miss, count_cached = self.misses.raise_by_one, snapshot.live_cache.hits.raise_by_one

        def settled(*arguments: Any) -> Any:
            if is_miss:
                count_miss()
                count_cached()
            record(context)
            return function(*arguments)

        if len(self._settled) >= MAX_SETTLED:
            self._settled = {}
        self._settled[key] = settled

    def _log_first_miss(self, context: SelectionContext, reason: str | None, kernel_id: str) -> None:
        import json

        log_warning(
            f"first miss of its kind: {reason}; {kernel_id} serves. "
            f"To cover it, add this line to a workload and tune: {json.dumps(context.to_dict())}"
        )


def _always_miss(*sizes: int) -> int:
    return MISS
