"""Growing the decision tree of one static key: what the regret model expects, in the fewest buckets that are worth it.

A tree is grown until nothing is lost that a split could save, and then pruned: a bucket stays where it saves more than
its price (cost-complexity pruning; Breiman et al. 1984, chapter 3, with a fixed price).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerzero_tune.compile.arrays import Rows
from layerzero_tune.compile.edge import Meeting
from layerzero_tune.compile.form import Leaf, Split, Tree
from layerzero_tune.compile.ground import MISS, Ground
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.region import Axes, Region, product_of
from layerzero_tune.compile.split import best_place
from layerzero_tune.compile.tree_parts import balanced, parts_along

# Mean log time over a key that one more bucket must save. Cross-validated on three results (efficiency; buckets of the
# whole): 0.0001 gives 0.9870 and 195, 0.0003 0.9877 and 188, 0.0005 0.9879 and 177, 0.001 0.9874 and 128.
BUCKET_PRICE = 0.0003


@dataclass(frozen=True)
class _Part:
    """What becomes of some places: one choice, or a split in two."""

    loss: float
    buckets: int
    choice: Choice
    split: tuple[Axes, int, _Part, _Part] | None = None


@dataclass(frozen=True)
class TreeGrower:
    """Grows a tree over a ground; the leaves are made by the builder."""

    ground: Ground
    leaves: LeafBuilder

    def grow(self, verdicts: Sequence[Verdict], region: Region) -> Tree:
        """The tree over a region that holds the ground's places; `verdicts` are those of its measured cells."""
        rows = np.arange(len(self.ground.sizes))
        return self._built(self._part(rows, region), rows, verdicts, region)

    def _part(self, rows: Rows, region: Region) -> _Part:
        loss, choice = self.ground.cheapest(rows)
        single = _Part(loss, 1, choice)
        if loss < BUCKET_PRICE:
            return single
        place = best_place(self.ground, rows, region.free)
        if place is None:
            return single
        is_low = self.ground.products(rows, place.axes) <= place.low
        low_region, high_region = region.divided(place.axes, place.low)
        low, high = self._part(rows[is_low], low_region), self._part(rows[~is_low], high_region)
        meeting = Meeting.of(self.ground, rows, place, self._served(low, rows), self._served(high, rows))
        edge = self._edge(meeting, region)
        together, buckets = meeting.loss(edge), low.buckets + high.buckets
        if together + BUCKET_PRICE * (buckets - 1) < loss:
            return _Part(together, buckets, choice, (place.axes, edge, low, high))
        return single

    def _served(self, part: _Part, rows: Rows) -> Rows:
        """The columns of the choices that the part gives at these places."""
        if part.split is None:
            return np.full(len(rows), self.ground.choices.index(part.choice), dtype=np.intp)
        axes, edge, low, high = part.split
        is_low = self.ground.products(rows, axes) <= edge
        served = np.empty(len(rows), dtype=np.intp)
        served[is_low], served[~is_low] = self._served(low, rows[is_low]), self._served(high, rows[~is_low])
        return served

    def _edge(self, meeting: Meeting, region: Region) -> int:
        """The last size below: where a hole begins, at a range limit of a choice, else where both sides cost the
        same."""
        place = meeting.place
        below, above = ([self.ground.choices[column] for column in found] for found in meeting.beside)
        if MISS in (*below, *above):
            return place.high - 1 if MISS in below else place.low
        if len(place.axes) == 1:
            for choice in dict.fromkeys((*below, *above, *self.ground.choices)):
                limit = self.leaves.limit_within(choice, region, place)
                if limit is not None:
                    return limit
        return meeting.crossing()

    def _built(self, part: _Part, rows: Rows, verdicts: Sequence[Verdict], region: Region) -> Tree:
        if part.split is None:
            # Edges around it may have been moved since: what serves there now decides.
            ranking = [choice for _, choice in self.ground.ranking(rows)] if len(rows) else [part.choice]
            return self.leaves.build(verdicts, region, ranking)
        axes, edge, below, above = part.split
        low_region, high_region = region.divided(axes, edge)
        if low_region.is_empty or high_region.is_empty:  # an edge around this one was moved past it
            side, inside = (above, high_region) if low_region.is_empty else (below, low_region)
            return self._built(side, rows, verdicts, inside)
        is_low = self.ground.products(rows, axes) <= edge
        low_verdicts = [verdict for verdict in verdicts if product_of(verdict.sizes, axes) <= edge]
        high_verdicts = [verdict for verdict in verdicts if product_of(verdict.sizes, axes) > edge]
        # A side without a cell proves nothing: what serves on the other one serves there too.
        if high_verdicts and not low_verdicts and not self.ground.holes[rows[is_low]].any():
            return self._built(above, rows, verdicts, region)
        if low_verdicts and not high_verdicts and not self.ground.holes[rows[~is_low]].any():
            return self._built(below, rows, verdicts, region)
        low = self._built(below, rows[is_low], low_verdicts, low_region)
        high = self._built(above, rows[~is_low], high_verdicts, high_region)
        return self._merged(Split(axes, edge, low, high), verdicts, region)

    def _merged(self, tree: Split, verdicts: Sequence[Verdict], region: Region) -> Tree:
        """The same decisions with neighbours in the tree's direction that differ in nothing made one bucket."""
        found = list(parts_along(tree, tree.axes))
        ends = [edge for edge, _ in found[1:]] + [None]
        starts: list[int | None] = []
        parts: list[Tree] = []
        for (start, part), end in zip(found, ends, strict=True):
            before = parts[-1] if parts else None
            if isinstance(before, Leaf) and isinstance(part, Leaf) and before.chain == part.chain:
                both = region.within(tree.axes, starts[-1], end)
                inside = [verdict for verdict in verdicts if both.holds(verdict.sizes)]
                one = self.leaves.build(inside, both, [step.choice for step in part.chain])
                if isinstance(one, Leaf) and one.chain == part.chain:
                    parts[-1] = one
                    continue
            starts.append(start)
            parts.append(part)
        return balanced(tree.axes, [start for start in starts if start is not None], parts)
