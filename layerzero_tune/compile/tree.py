"""Growing the decision tree of one static key: the fewest buckets that give every cell an acceptable choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layerzero_tune.compile.cell import MISS, Cell
from layerzero_tune.compile.edge import edge_at
from layerzero_tune.compile.form import Leaf, Split, Tree, leaves_of
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.region import Region, product_of
from layerzero_tune.compile.split import best_place
from layerzero_tune.compile.tree_parts import balanced, parts_along


@dataclass(frozen=True)
class TreeGrower:
    """Grows trees whose leaves one builder makes."""

    leaves: LeafBuilder

    def grow(self, cells: Sequence[Cell], region: Region, previous: Choice | None = None) -> Tree:
        """The tree over a region that holds these cells; `previous` is the choice of the bucket before it."""
        common = frozenset.intersection(*(cell.acceptable for cell in cells))
        if common:
            choice = self._tie_break(common, previous)
            strict = [cell.without_doubt(self.leaves.default) for cell in cells]
            if strict != cells and not self.leaves.is_proved(cells, choice):
                return self.grow(strict, region, previous)
            return self.leaves.build(cells, region, choice)
        place = best_place(cells, region.free)
        if place is None:
            return self.leaves.build(cells, region, self._compromise(cells))
        limit = self.leaves.limit_at(cells, region.free, place) if len(place.axes) == 1 else None
        edge = edge_at(cells, place) if limit is None else limit
        low_region, high_region = region.divided(place.axes, edge)
        low = self.grow([cell for cell in cells if product_of(cell.sizes, place.axes) <= edge], low_region, previous)
        last = list(leaves_of(low))[-1]
        before = last.chain[0].choice if last.chain else previous
        high = self.grow([cell for cell in cells if product_of(cell.sizes, place.axes) > edge], high_region, before)
        return self._merged(Split(place.axes, edge, low, high), cells, region)

    def _tie_break(self, common: frozenset[Choice], previous: Choice | None) -> Choice:
        """Stability: the default, then the previous bucket's choice, then the kernel's id."""
        for choice in (self.leaves.default, previous):
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
        if not gaining and any(self.leaves.default in verdict.standings for verdict in verdicts):
            return self.leaves.default
        return min(gaining or cost, key=lambda choice: (round(cost[choice], 9), choice))

    def _merged(self, tree: Split, cells: Sequence[Cell], region: Region) -> Tree:
        """The same decisions with neighbours in the tree's direction that differ in nothing made one bucket."""
        found = list(parts_along(tree, tree.axes))
        ends = [edge for edge, _ in found[1:]] + [None]
        starts: list[int | None] = []
        parts: list[Tree] = []
        for (start, part), end in zip(found, ends, strict=True):
            before = parts[-1] if parts else None
            if isinstance(before, Leaf) and isinstance(part, Leaf) and before.chain == part.chain:
                both = region.within(tree.axes, starts[-1], end)
                inside = [cell for cell in cells if both.holds(cell.sizes)]
                one = self.leaves.build(inside, both, part.chain[0].choice if part.chain else MISS)
                if isinstance(one, Leaf) and one.chain == part.chain:
                    parts[-1] = one
                    continue
            starts.append(start)
            parts.append(part)
        return balanced(tree.axes, [start for start in starts if start is not None], parts)
