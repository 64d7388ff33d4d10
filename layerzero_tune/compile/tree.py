"""Growing the decision tree of one static key: the fewest buckets that give every cell an acceptable choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation
from layerzero_tune.compile.cell import MISS, Cell
from layerzero_tune.compile.edge import edge_between
from layerzero_tune.compile.form import Box, Leaf, Split, Step, Tree, leaves_of
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.leaf_evidence import evidence_of
from layerzero_tune.compile.legality import legality
from layerzero_tune.compile.tree_parts import balanced, parts_along

# Sizes that lie closer together than this factor share a bucket. What sets them apart is not their magnitude but
# whether they are even or fill whole tiles, which says nothing about the sizes in between.
MIN_STEP = 1.05


@dataclass(frozen=True)
class TreeGrower:
    """What stays the same while the tree of one static key grows.

    `context` has the key's static features and the table's device. `default_is_measured` says whether the default has a
    time in any cell of the key.
    """

    operation: Operation
    context: SelectionContext
    kernels: Mapping[str, Kernel]
    free: tuple[int, ...]
    default: Choice
    default_is_measured: bool

    def grow(self, cells: Sequence[Cell], box: Box, previous: Choice | None = None) -> Tree:
        """The tree over a box that holds these cells; `previous` is the choice of the bucket before it."""
        common = frozenset.intersection(*(cell.acceptable for cell in cells))
        if common:
            return self._leaf(cells, box, self._tie_break(common, previous))
        split = self._best_split(cells)
        if split is None:
            return self._leaf(cells, box, self._compromise(cells))
        axis, edge = split
        low_box, high_box = self._divide(box, axis, edge)
        low = self.grow([cell for cell in cells if cell.sizes[axis] <= edge], low_box, previous)
        last = list(leaves_of(low))[-1]
        before = last.chain[0].choice if last.chain else previous
        high = self.grow([cell for cell in cells if cell.sizes[axis] > edge], high_box, before)
        return self._merged(Split(axis, edge, low, high), cells)

    def _tie_break(self, common: frozenset[Choice], previous: Choice | None) -> Choice:
        """Stability: the default, then the previous bucket's choice, then the kernel's id."""
        for choice in (self.default, previous):
            if choice is not None and choice in common:
                return choice
        return min(common)

    def _compromise(self, cells: Sequence[Cell]) -> Choice:
        """One choice for cells that share a bucket although none suits them all: the cheapest that is proved to gain on
        the default at every one of them, else the default, else the cheapest."""
        verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
        if not verdicts:
            return MISS
        cost = {
            choice: math.fsum(cell.cost(choice) for cell in cells)
            for choice in sorted({choice for verdict in verdicts for choice in verdict.standings})
        }
        gaining = [choice for choice in cost if all(verdict.gains(choice) for verdict in verdicts)]
        if not gaining and any(self.default in verdict.standings for verdict in verdicts):
            return self.default
        return min(gaining or cost, key=lambda choice: (round(cost[choice], 9), choice))

    def _best_split(self, cells: Sequence[Cell]) -> tuple[int, int] | None:
        """The axis and edge whose two sides cost least when each gets its one best choice; None where all cells lie
        closer together than `MIN_STEP`."""
        choices = sorted({choice for cell in cells for choice in cell.acceptable})
        costs = np.array([[cell.cost(choice) for choice in choices] for cell in cells])
        best: tuple[float, int, int] | None = None
        split: tuple[int, tuple[int, int]] = (0, (0, 0))
        sides = (MISS, MISS)
        for axis in self.free:
            order = sorted(range(len(cells)), key=lambda index, axis=axis: cells[index].sizes[axis])  # type: ignore[misc]
            low_sums = np.cumsum(costs[order], axis=0)
            high_sums = low_sums[-1] - low_sums
            for position in range(len(order) - 1):
                low_size = cells[order[position]].sizes[axis]
                high_size = cells[order[position + 1]].sizes[axis]
                if high_size < low_size * MIN_STEP:
                    continue
                total = float(low_sums[position].min() + high_sums[position].min())
                # Of equal costs the most even split, so that the tree stays shallow.
                rank = (round(total, 9), abs(2 * (position + 1) - len(order)), axis)
                if best is None or rank < best:
                    best = rank
                    split = axis, (low_size, high_size)
                    sides = choices[int(low_sums[position].argmin())], choices[int(high_sums[position].argmin())]
        if best is None:
            return None
        axis, (low, high) = split
        limit = self._limit_between(cells, axis, low, high, sides)
        return axis, edge_between(cells, axis, low, high) if limit is None else limit

    def _limit_between(
        self, cells: Sequence[Cell], axis: int, low: int, high: int, sides: tuple[Choice, Choice]
    ) -> int | None:
        """The edge at a range limit, between two neighbouring grid lines, of the choice that suits one side best: the
        line beyond cannot say what it is worth up to there."""
        ranges = tuple((min(sizes), max(sizes)) for sizes in zip(*(cell.sizes for cell in cells), strict=True))
        box = self._divide(self._divide(ranges, axis, high)[0], axis, low - 1)[1]
        for choice in sides:
            if choice != MISS:
                found = legality(self.kernels[choice[0]], self.operation, self.context, box)
                edges = [edge for at, edge in found.splits if at == axis]
                if edges:
                    return edges[0]
        return None

    def _divide(self, box: Box, axis: int, edge: int) -> tuple[Box, Box]:
        """Both halves of a box; axes that are tied to the split one follow it."""
        low, high = list(box), list(box)
        index = axis
        while True:
            low[index] = (box[index][0], edge)
            high[index] = (edge + 1, box[index][1])
            index += 1
            if index >= len(box) or index in self.free:
                return tuple(low), tuple(high)

    def _leaf(self, cells: Sequence[Cell], box: Box, choice: Choice) -> Tree:
        """A leaf that gives the choice wherever its limits allow, split or guarded where they do not."""
        if choice == MISS:
            return Leaf(box, (), None)
        found = legality(self.kernels[choice[0]], self.operation, self.context, box)
        if found.violated is not None:
            # The choice was measured in no cell of this box: the default serves, else it is a miss.
            serves = choice != self.default and self._default_stands_in(cells)
            return self._leaf(cells, box, self.default) if serves else Leaf(box, (), None)
        split = found.splits[0] if found.splits else self._stand_in_split(cells, box) if found.guards else None
        if split is not None:
            axis, edge = split
            low_box, high_box = self._divide(box, axis, edge)
            low, high = (
                self._leaf([cell for cell in cells if low <= cell.sizes[axis] <= high], half, choice)
                for half in (low_box, high_box)
                for low, high in (half[axis],)
            )
            return Split(axis, edge, low, high)
        chain = [Step(choice, found.guards)]
        for stand_in in self._stand_ins(cells, choice):
            if not chain[-1].guards:
                break
            behind = legality(self.kernels[stand_in[0]], self.operation, self.context, box)
            if behind.violated is None and not behind.splits:
                chain.append(Step(stand_in, behind.guards))
        verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
        return Leaf(box, tuple(chain), evidence_of(choice, self.default, verdicts))

    def _stand_ins(self, cells: Sequence[Cell], choice: Choice) -> Sequence[Choice]:
        """What may serve behind a choice's guards, best first: proved to gain wherever these cells were measured, and
        the default."""
        verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
        gaining = [
            other
            for other in sorted(verdicts[0].standings if verdicts else ())
            if other != choice and all(verdict.gains(other) for verdict in verdicts)
        ]
        gaining.sort(key=lambda other: (round(math.fsum(verdict.regret(other) for verdict in verdicts), 9), other))
        last = [self.default] if choice != self.default and self._default_stands_in(cells) else []
        return [*gaining, *last]

    def _stand_in_split(self, cells: Sequence[Cell], box: Box) -> tuple[int, int] | None:
        """Where a range limit of a choice runs through the box that may stand behind guards on one side of it."""
        verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
        for other in sorted({choice for verdict in verdicts for choice in verdict.standings if verdict.gains(choice)}):
            found = legality(self.kernels[other[0]], self.operation, self.context, box)
            for axis, edge in found.splits:
                sides = (
                    [verdict for verdict in verdicts if (verdict.sizes[axis] <= edge) == is_low]
                    for is_low in (True, False)
                )
                if any(side and all(verdict.gains(other) for verdict in side) for side in sides):
                    return axis, edge
        return None

    def _default_stands_in(self, cells: Sequence[Cell]) -> bool:
        """Whether the default may serve where a choice is illegal: it has a time wherever these cells were measured."""
        return self.default_is_measured and all(
            self.default in cell.verdict.standings for cell in cells if cell.verdict is not None
        )

    def _merged(self, tree: Split, cells: Sequence[Cell]) -> Tree:
        """The same decisions with neighbours along the tree's axis that differ in nothing made one bucket."""
        axis = tree.axis
        edges: list[int] = []
        parts: list[Tree] = []
        for edge, part in parts_along(tree, axis):
            before = parts[-1] if parts else None
            if isinstance(before, Leaf) and isinstance(part, Leaf) and before.chain == part.chain:
                box = tuple((low, high) for (low, _), (_, high) in zip(before.box, part.box, strict=True))
                inside = [cell for cell in cells if _lies_in(cell, box)]
                one = self._leaf(inside, box, part.chain[0].choice if part.chain else MISS)
                if isinstance(one, Leaf) and one.chain == part.chain:
                    parts[-1] = one
                    continue
            if edge is not None:
                edges.append(edge)
            parts.append(part)
        return balanced(axis, edges, parts)


def _lies_in(cell: Cell, box: Box) -> bool:
    return all(low <= size <= high for size, (low, high) in zip(cell.sizes, box, strict=True))
