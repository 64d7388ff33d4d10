"""Growing the decision tree of one static key: what the regret model expects, in the fewest buckets that are worth it.

A tree is grown until nothing is lost that a split could save, and then pruned: a bucket stays where it saves more than
its price (cost-complexity pruning; Breiman et al. 1984, chapter 3, with a fixed price).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from layerzero_tune.compile.arrays import Rows
from layerzero_tune.compile.edge import Meeting
from layerzero_tune.compile.feature import Feature, feature_at, is_axis
from layerzero_tune.compile.form import Leaf, Split, Tree
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.judge import Verdict
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.split import BUCKET_PRICE, best_place
from layerzero_tune.compile.tree_parts import merged


@dataclass(frozen=True)
class _Part:
    """What becomes of some places: one chain, by its column in the ground, or a split in two."""

    loss: float
    buckets: int
    chain: int
    split: tuple[Feature, int, _Part, _Part] | None = None


@dataclass(frozen=True)
class TreeGrower:
    """Grows a tree over a ground; the leaves are made by the builder. `features` are what its splits may compare."""

    ground: Ground
    leaves: LeafBuilder
    features: Sequence[Feature]

    def grow(self, verdicts: Sequence[Verdict], region: Region) -> Tree:
        """The tree over a region that holds the ground's places; `verdicts` are those of its measured cells."""
        rows = np.arange(len(self.ground.sizes))
        return self._built(self._part(rows, region), rows, verdicts, region)

    def _part(self, rows: Rows, region: Region) -> _Part:
        loss, chain = self.ground.cheapest(rows)
        single = _Part(loss, 1, chain)
        if loss < BUCKET_PRICE:
            return single
        place = best_place(self.ground, rows, self.features)
        if place is None:
            return single
        is_low = self.ground.features(rows, place.feature) <= place.low
        low_region, high_region = region.divided(place.feature, place.low)
        low, high = self._part(rows[is_low], low_region), self._part(rows[~is_low], high_region)
        meeting = Meeting.of(self.ground, rows, place, self._served(low, rows), self._served(high, rows))
        edge = self._edge(meeting, region)
        is_low = self.ground.features(rows, place.feature) <= edge
        if not (self._is_proved(low, rows[is_low]) and self._is_proved(high, rows[~is_low])):
            meeting = meeting.at(place)
            edge = self._edge(meeting, region)
        split = _Part(meeting.loss(edge), low.buckets + high.buckets, chain, (place.feature, edge, low, high))
        # What parts one side may do for both (subtree raising; Quinlan 1993, chapter 4).
        raised = [self._over(side, rows) for side in (low, high) if self._is_proved(side, rows)]
        return min((single, *raised, split), key=lambda part: round(part.loss + BUCKET_PRICE * part.buckets, 12))

    def _over(self, part: _Part, rows: Rows) -> _Part:
        """The part with what it loses at these places."""
        lost = self.ground.losses[rows, self._served(part, rows)].tolist()
        return replace(part, loss=round(math.fsum(lost), 12))

    def _is_proved(self, part: _Part, rows: Rows) -> bool:
        """Whether the measured cells among these places prove each choice of the part where it serves."""
        if part.split is None:
            return self.ground.proves(part.chain, rows)
        feature, edge, low, high = part.split
        is_low = self.ground.features(rows, feature) <= edge
        return self._is_proved(low, rows[is_low]) and self._is_proved(high, rows[~is_low])

    def _served(self, part: _Part, rows: Rows) -> Rows:
        """The columns of the chains that the part gives at these places."""
        if part.split is None:
            return np.full(len(rows), part.chain, dtype=np.intp)
        feature, edge, low, high = part.split
        is_low = self.ground.features(rows, feature) <= edge
        served = np.empty(len(rows), dtype=np.intp)
        served[is_low], served[~is_low] = self._served(low, rows[is_low]), self._served(high, rows[~is_low])
        return served

    def _edge(self, meeting: Meeting, region: Region) -> int:
        """The last size below: at a range limit of a choice, else where both sides cost the same."""
        place = meeting.place
        below, above = ([c for column in found for c in self.ground.chain(column)] for found in meeting.beside)
        if is_axis(place.feature):
            for choice in dict.fromkeys((*below, *above, *self.ground.choices)):
                limit = self.leaves.limit_within(choice, region, place)
                if limit is not None:
                    return limit
        return meeting.crossing()

    def _built(self, part: _Part, rows: Rows, verdicts: Sequence[Verdict], region: Region) -> Tree:
        if part.split is None:
            # Edges around it may have been moved since: what serves there now decides.
            columns = [column for _, column in self.ground.ranking(rows)] if len(rows) else [part.chain]
            ranking = dict.fromkeys(choice for column in columns for choice in self.ground.chain(column))
            return self.leaves.build(verdicts, region, list(ranking))
        feature, edge, below, above = part.split
        low_region, high_region = region.divided(feature, edge)
        if low_region.is_empty or high_region.is_empty:  # an edge around this one was moved past it
            side, inside = (above, high_region) if low_region.is_empty else (below, low_region)
            return self._built(side, rows, verdicts, inside)
        is_low = self.ground.features(rows, feature) <= edge
        low_verdicts = [verdict for verdict in verdicts if feature_at(verdict.sizes, feature) <= edge]
        high_verdicts = [verdict for verdict in verdicts if feature_at(verdict.sizes, feature) > edge]
        # A side without a cell proves nothing: what serves on the other one serves there too.
        if high_verdicts and not low_verdicts:
            return self._built(above, rows, verdicts, region)
        if low_verdicts and not high_verdicts:
            return self._built(below, rows, verdicts, region)
        low = self._built(below, rows[is_low], low_verdicts, low_region)
        high = self._built(above, rows[~is_low], high_verdicts, high_region)
        return self._merged(Split(feature, edge, low, high), verdicts, region)

    def _merged(self, tree: Split, verdicts: Sequence[Verdict], region: Region) -> Tree:
        """The same decisions with neighbours in the tree's direction that differ in nothing made one bucket."""

        def joined(one: Leaf, other: Leaf, both: Region) -> Leaf | None:
            if one.chain != other.chain:
                return None
            inside = [verdict for verdict in verdicts if both.holds(verdict.sizes)]
            found = self.leaves.build(inside, both, [step.choice for step in one.chain])
            return found if isinstance(found, Leaf) and found.chain == one.chain else None

        return merged(tree, region, joined)
