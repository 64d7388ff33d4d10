"""Making leaves: a choice wherever its limits allow it, with guards and what stands behind them where they may not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation, Sizes
from layerzero_runtime.selection.limits import Limit
from layerzero_tune.compile.form import Leaf, Split, Step, Tree
from layerzero_tune.compile.ground import MISS
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.compile.leaf_evidence import evidence_of, is_proved
from layerzero_tune.compile.legality import RANGES, Legality, legality, size_limits
from layerzero_tune.compile.region import Box, Region
from layerzero_tune.compile.split import Place


@dataclass(frozen=True)
class LeafBuilder:
    """Leaves of one static key.

    `context` has the key's static features and the table's device. `default_is_measured` says whether the default has a
    time in any cell of the key.
    """

    operation: Operation
    context: SelectionContext
    kernels: Mapping[str, Kernel]
    default: Choice
    default_is_measured: bool

    def build(self, verdicts: Sequence[Verdict], region: Region, choice: Choice) -> Tree:
        """A leaf that gives the choice in a region that holds these verdicts, or several where a range limit of it runs
        through; a miss where neither the choice nor the default may serve."""
        if choice == MISS:
            return Leaf(region, (), None)
        found = self._legality(choice, region.box)
        if found.violated is not None or not is_proved(choice, self.default, verdicts):
            # The choice was measured in no cell of this region, or gains too little on those that a limit has cut off:
            # the default serves, else it is a miss.
            serves = choice != self.default and self._default_stands_in(verdicts)
            return self.build(verdicts, region, self.default) if serves else Leaf(region, (), None)
        split = found.splits[0] if found.splits else self._stand_in_split(verdicts, region) if found.guards else None
        if split is None:
            return self._leaf(verdicts, region, choice, found)
        axis, edge = split
        low_region, high_region = region.divided((axis,), edge)
        low, high = ([each for each in verdicts if (each.sizes[axis] <= edge) == is_low] for is_low in (True, False))
        if low_region.is_empty or high_region.is_empty:
            return self.build(verdicts, low_region if high_region.is_empty else high_region, choice)
        return Split((axis,), edge, self.build(low, low_region, choice), self.build(high, high_region, choice))

    def limit_within(self, choice: Choice, region: Region, place: Place) -> int | None:
        """The range limit of a choice on the axis of a split between these sizes: up to there it may serve."""
        if choice == MISS:
            return None
        between = region.within(place.axes, place.low - 1, place.high).box
        edges = [edge for axis, edge in self._legality(choice, between).splits if (axis,) == place.axes]
        return edges[0] if edges else None

    def serving(self, choices: Sequence[Choice], places: Sequence[Sizes]) -> Sequence[Sequence[Choice | None]]:
        """What serves at each of these sizes in a bucket that gives each of the choices: the choice itself, where its
        limits allow that as far as sizes determine it; the default, where a guard turns it away; else nothing."""
        limits = {choice: size_limits(self.kernels[choice[0]], self.operation) for choice in choices}
        asked = any(limits.values())
        contexts = [self.operation.with_sizes(self.context, sizes) if asked else self.context for sizes in places]
        return [[self._serving(choice, limits[choice], context) for choice in choices] for context in contexts]

    def _serving(self, choice: Choice, limits: Sequence[Limit], context: SelectionContext) -> Choice | None:
        violated = next((limit for limit in limits if limit.reject(context) is not None), None)
        if violated is None:
            return choice
        return None if violated.kind in RANGES else self.default

    def _legality(self, choice: Choice, box: Box) -> Legality:
        return legality(self.kernels[choice[0]], self.operation, self.context, box)

    def _leaf(self, verdicts: Sequence[Verdict], region: Region, choice: Choice, found: Legality) -> Leaf:
        chain = [Step(choice, found.guards)]
        for stand_in in self._stand_ins(verdicts, choice):
            if not chain[-1].guards:
                break
            behind = self._legality(stand_in, region.box)
            if behind.violated is None and not behind.splits:
                chain.append(Step(stand_in, behind.guards))
        return Leaf(region, tuple(chain), evidence_of(choice, self.default, verdicts))

    def _stand_ins(self, verdicts: Sequence[Verdict], choice: Choice) -> Sequence[Choice]:
        """What may serve behind a choice's guards, best first: proved to gain wherever these cells were measured, and
        the default."""
        gaining = [
            other
            for other in sorted(verdicts[0].standings if verdicts else ())
            if other != choice and all(verdict.gains(other) for verdict in verdicts)
        ]
        gaining.sort(key=lambda other: (round(math.fsum(verdict.regret(other) for verdict in verdicts), 9), other))
        last = [self.default] if choice != self.default and self._default_stands_in(verdicts) else []
        return [*gaining, *last]

    def _stand_in_split(self, verdicts: Sequence[Verdict], region: Region) -> tuple[int, int] | None:
        """Where a range limit of a choice runs through the region that may stand behind guards on one side of it."""
        for other in sorted({choice for verdict in verdicts for choice in verdict.standings if verdict.gains(choice)}):
            for axis, edge in self._legality(other, region.box).splits:
                sides = (
                    [verdict for verdict in verdicts if (verdict.sizes[axis] <= edge) == is_low]
                    for is_low in (True, False)
                )
                if any(side and all(verdict.gains(other) for verdict in side) for side in sides):
                    return axis, edge
        return None

    def _default_stands_in(self, verdicts: Sequence[Verdict]) -> bool:
        """Whether the default may serve where a choice is illegal: it has a time wherever these cells were measured."""
        return self.default_is_measured and all(self.default in verdict.standings for verdict in verdicts)
