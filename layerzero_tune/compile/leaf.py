"""Making leaves: a choice wherever its limits allow it, with guards and what stands behind them where they may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation, Sizes
from layerzero_runtime.selection.limits import Limit
from layerzero_tune.compile.form import Leaf, Split, Step, Tree
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.compile.leaf_evidence import evidence_of, is_proved
from layerzero_tune.compile.legality import RANGES, Legality, legality, size_limits
from layerzero_tune.compile.region import Box, Region
from layerzero_tune.compile.scope import Scope, scope_of
from layerzero_tune.compile.split import Place


@dataclass(frozen=True)
class LeafBuilder:
    """Leaves of one static key.

    `context` has the key's static features and the table's device. `default_is_measured` says whether the default has a
    time in any cell of the key; `tried` are the verdicts of all cells that say something of it.
    """

    operation: Operation
    context: SelectionContext
    kernels: Mapping[str, Kernel]
    default: Choice
    default_is_measured: bool
    tried: Sequence[Verdict]

    def build(self, verdicts: Sequence[Verdict], region: Region, ranking: Sequence[Choice]) -> Tree:
        """A leaf that gives the first choice of a ranking that may serve in a region that holds these verdicts, with
        the following ones behind its guards; or several, where a range limit runs through it. A miss where none of them
        may serve.

        May serve what is legal in some of the region, and gains enough on those of its cells that a limit has not cut
        off.
        """
        for place, choice in enumerate(ranking):
            found = self._legality(choice, region.box)
            stands = place == 0 or choice != self.default or self._default_stands_in(verdicts)
            if found.violated is None and stands and is_proved(choice, self.default, verdicts):
                return self._served(verdicts, region, ranking[place:], found)
        return Leaf(region, (), None)

    def _served(self, verdicts: Sequence[Verdict], region: Region, ranking: Sequence[Choice], found: Legality) -> Tree:
        chain, split = self._chain(verdicts, region, ranking, found)
        if split is None:
            return Leaf(region, tuple(chain), evidence_of(ranking[0], self.default, verdicts))
        axis, edge = split
        low_region, high_region = region.divided((axis,), edge)
        low, high = ([each for each in verdicts if (each.sizes[axis] <= edge) == is_low] for is_low in (True, False))
        if low_region.is_empty or high_region.is_empty:
            return self.build(verdicts, low_region if high_region.is_empty else high_region, ranking)
        return Split((axis,), edge, self.build(low, low_region, ranking), self.build(high, high_region, ranking))

    def _chain(
        self, verdicts: Sequence[Verdict], region: Region, ranking: Sequence[Choice], found: Legality
    ) -> tuple[list[Step], tuple[int, int] | None]:
        """The first of a ranking and what serves behind its guards, and at what size on which axis the region has to be
        split before, because a range limit runs through it."""
        chain = [Step(ranking[0], found.guards)]
        if found.splits:
            return chain, found.splits[0]
        for choice in ranking[1:]:
            if not chain[-1].guards:
                break
            behind = self._legality(choice, region.box)
            # What has all guards of the choice before is turned away with it.
            if behind.violated is not None or set(chain[-1].guards) <= set(behind.guards):
                continue
            if choice == self.default and not self._default_stands_in(verdicts):
                continue
            if not is_proved(choice, self.default, verdicts):
                continue
            if behind.splits:
                return chain, behind.splits[0]
            chain.append(Step(choice, behind.guards))
        return chain, None

    def is_legal(self, leaf: Leaf) -> bool:
        """Whether what a leaf gives may serve in all of its region behind the guards that it has."""
        for step in leaf.chain:
            found = self._legality(step.choice, leaf.region.box)
            if found.violated is not None or found.splits or not set(found.guards) <= set(step.guards):
                return False
        return True

    def limit_within(self, choice: Choice, region: Region, place: Place) -> int | None:
        """The range limit of a choice on the axis of a split between these sizes: up to there it may serve."""
        between = region.within(place.feature, place.low - 1, place.high).box
        edges = [edge for axis, edge in self._legality(choice, between).splits if (axis,) == place.feature]
        return edges[0] if edges else None

    def serving(self, choices: Sequence[Choice], places: Sequence[Sizes]) -> Sequence[Sequence[Choice | None]]:
        """What serves at each of these sizes in a bucket that gives each of the choices: the choice itself, where its
        limits allow that as far as sizes determine it, and where its configuration is expected to serve; the default,
        where a guard turns it away; else nothing."""
        # Configurations of a kernel share its limits.
        limits = {kernel_id: size_limits(self.kernels[kernel_id], self.operation) for kernel_id, _ in choices}
        scopes = {
            choice: scope_of(self.kernels[choice[0]], choice, self.tried, self.context.device) for choice in choices
        }
        asked = any(limits.values()) or any(scopes.values())
        contexts = [self.operation.with_sizes(self.context, sizes) if asked else self.context for sizes in places]

        def line(context: SelectionContext) -> Sequence[Choice | None]:
            violated = {kernel_id: _violated(bounds, context) for kernel_id, bounds in limits.items()}
            return [self._serving(choice, violated[choice[0]], scopes[choice], context) for choice in choices]

        return [line(context) for context in contexts]

    def passes(self, choice: Choice, context: SelectionContext) -> bool:
        """Whether a choice's limits allow a call as far as its sizes do not tell."""
        kernel = self.kernels[choice[0]]
        told = size_limits(kernel, self.operation)
        return all(limit in told or limit.reject(context) is None for limit in kernel.spec.limits)

    def _serving(
        self, choice: Choice, violated: Limit | None, scope: Scope | None, context: SelectionContext
    ) -> Choice | None:
        if violated is None:
            return choice if scope is None or scope.holds(context) else None
        return None if violated.kind in RANGES else self.default

    def _legality(self, choice: Choice, box: Box) -> Legality:
        return legality(self.kernels[choice[0]], self.operation, self.context, box)

    def _default_stands_in(self, verdicts: Sequence[Verdict]) -> bool:
        """Whether the default may serve where a choice is illegal: it has a time wherever these cells were measured."""
        return self.default_is_measured and all(self.default in verdict.standings for verdict in verdicts)


def _violated(limits: Sequence[Limit], context: SelectionContext) -> Limit | None:
    return next((limit for limit in limits if limit.reject(context) is not None), None)
