"""Cover: the boxes of a static key in which measured cells vouch for sizes, and those in which a table must miss.

Apart from what is fastest: a tree that parts both at once spends its measured cells on holes, and leaves too few on
either side of an edge between kernels. The results of an H100 have up to 1,600 holes under a key of attention.cross:
decoding and long chunks were measured, little in between. Of 7,327 calls of its attention in graphs, half an octave
beside those of a workload, such trees missed at 2.1%; now 0.2% are missed, with three quarters of the buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.arrays import Mask, Rows
from layerzero_tune.compile.feature import Axes, features_at
from layerzero_tune.compile.foreseen import Foreseen
from layerzero_tune.compile.form import Leaf, Split, Tree, leaves_of
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.regret import VOUCHED, vouching
from layerzero_tune.compile.tree_parts import merged

# What it costs to miss at a cell or to serve a hole, to miss at a foreseen size, to serve one around a hole, and to
# have one more box: to part a hole from all around it takes as many of them as there are sides.
_WRONG, _MISSED, _AROUND_HOLE, _BOX = 100, 4, 1, 10


@dataclass(frozen=True)
class Covered:
    """A box, and whether a table serves it."""

    is_served: bool


@dataclass(frozen=True)
class Parted:
    """`low` is for sizes of at most the edge on the axis, `high` for those above."""

    axis: int
    edge: int
    low: Cover
    high: Cover


Cover = Covered | Parted
Places = NDArray[np.int64]  # (places, axes)


def cover_of(cells: Sequence[Sizes], foreseen: Foreseen, holes: Sequence[Sizes], free: Axes) -> Cover:
    """The cover that serves these cells and misses at the holes, and does so at the foreseen sizes too where they are
    worth a box; one that it serves holds a cell, as far as a box can."""
    if not holes and not foreseen.missed:
        return Covered(True)
    served = [*cells, *foreseen.served]
    sizes = np.array([*served, *foreseen.missed, *holes], dtype=np.int64)
    numbers = np.arange(len(sizes))
    is_served = numbers < len(served)
    if_served = np.where(numbers < len(served) + len(foreseen.missed), _AROUND_HOLE, _WRONG)
    if_missed = np.where(numbers < len(cells), _WRONG, _MISSED)
    costs = np.stack([np.where(is_served, 0, if_served), np.where(is_served, if_missed, 0)], axis=1)
    return _Places(sizes, costs, numbers < len(cells), is_served, free).cover(numbers)


@dataclass(frozen=True)
class _Places:
    """Attributes:
    sizes: (places, axes).
    costs: (places, 2), of serving a place and of a miss there.
    measured: which are cells.
    served: which should be served.
    """

    sizes: Places
    costs: NDArray[np.int64]
    measured: Mask
    served: Mask
    free: Axes

    def cover(self, rows: Rows) -> Cover:
        if_served, if_missed = self.costs[rows].sum(axis=0).tolist()
        whole = Covered(if_served <= if_missed)
        cuts = [] if min(if_served, if_missed) < _BOX else list(self._cuts(rows))
        if not cuts:
            return whole
        _, axis, least, most = min(cuts)
        is_low = self.sizes[rows, axis] <= least
        low, high = self.cover(rows[is_low]), self.cover(rows[~is_low])
        parted = Parted(axis, self._edge(rows, axis, least, most, low, high), low, high)
        # What parts one side may do for both (subtree raising; Quinlan 1993, chapter 4).
        return min((whole, low, high, parted), key=lambda found: self._price(found, rows))

    def _price(self, cover: Cover, rows: Rows) -> int:
        """What the cover costs at these places, and its boxes."""
        if isinstance(cover, Covered):
            return int(self.costs[rows, 0 if cover.is_served else 1].sum()) + _BOX
        is_low = self.sizes[rows, cover.axis] <= cover.edge
        return self._price(cover.low, rows[is_low]) + self._price(cover.high, rows[~is_low])

    def _cuts(self, rows: Rows) -> Iterator[tuple[tuple[bool, int, float, int], int, int, int]]:
        """The best cut on each axis: its rank, the axis, and between which sizes it lies."""
        for axis in self.free:
            order = np.argsort(self.sizes[rows, axis], kind="stable")
            ordered = rows[order]
            sizes, costs = self.sizes[ordered, axis], self.costs[ordered]
            steps, told = sizes[1:] > sizes[:-1], self._told(ordered)
            is_bare = not (steps & told).any()
            cuts = np.flatnonzero(steps if is_bare else steps & told)
            if not len(cuts):
                continue
            low_sums = np.cumsum(costs, axis=0)
            left = (low_sums.min(axis=1) + (low_sums[-1] - low_sums).min(axis=1))[cuts].tolist()
            mixed = _mixed(self.served[ordered], cuts)
            uneven = np.abs(2 * (cuts + 1) - len(rows))
            best = min(range(len(cuts)), key=lambda i: (left[i], mixed[i], uneven[i]))
            cut = int(cuts[best])
            rank = (is_bare, left[best], mixed[best], int(uneven[best]))
            yield rank, axis, int(sizes[cut]), int(sizes[cut + 1])

    def _told(self, rows: Rows) -> Mask:
        """After which of the rows, but the last, a cut leaves on each side a cell, or nothing but what is missed."""
        held, served = np.cumsum(self.measured[rows]), np.cumsum(self.served[rows])
        told: Mask = ((held > 0) | (served == 0)) & ((held < held[-1]) | (served == served[-1]))
        return told[:-1]

    def _edge(self, rows: Rows, axis: int, least: int, most: int, low: Cover, high: Cover) -> int:
        """The last size below: beside what is missed as far as the cells vouch that lie near on the other axes, if that
        is told, else where the last place lies that is known to be served."""
        if not self._is_served(low, rows[self.sizes[rows, axis] == least]):
            ends = [math.ceil(size / VOUCHED) - 1 for size in self._vouching(rows, axis, most)]
            return min((edge for edge in ends if least <= edge < most), default=most - 1)
        if not self._is_served(high, rows[self.sizes[rows, axis] == most]):
            ends = [math.floor(size * VOUCHED) for size in self._vouching(rows, axis, least)]
            return max((edge for edge in ends if least <= edge < most), default=least)
        return math.isqrt(least * most)

    def _is_served(self, cover: Cover, rows: Rows) -> bool:
        return all(is_served_at(cover, sizes) for sizes in self.sizes[rows].tolist())

    def _vouching(self, rows: Rows, axis: int, size: int) -> list[int]:
        """The sizes on an axis of the cells that, on all others, vouch for a place that should be served at this
        size."""
        others = [other for other in self.free if other != axis]
        beside = rows[(self.sizes[rows, axis] == size) & self.served[rows]]
        cells, places = (np.log2(self.sizes[kept][:, others]) for kept in (self.measured, beside))
        near = vouching(cells[:, None], places).any(axis=1)
        found: list[int] = self.sizes[self.measured, axis][near].tolist()
        return found


def is_served_at(cover: Cover, sizes: Sequence[int]) -> bool:
    """Whether the box that holds these sizes is served."""
    while isinstance(cover, Parted):
        cover = cover.low if sizes[cover.axis] <= cover.edge else cover.high
    return cover.is_served


@dataclass(frozen=True)
class Cutter:
    """Cuts boxes that are not served out of trees. `is_legal` says whether a leaf's chain may serve in its region."""

    is_legal: Callable[[Leaf], bool]

    def cut_out(self, tree: Tree, cover: Cover, region: Region, places: Places) -> Tree:
        """The tree over a region with a miss in each box that is not served. Of a bucket that boxes run through there
        are several leaves with one chain and its evidence: all cells of the bucket.

        `places` are those in the region that are served: a part in which none lies goes with the part beside it, if
        that is legal.
        """
        if isinstance(cover, Covered):
            return self._within(tree, region, places) if cover.is_served else Leaf(region, (), None)
        low_region, high_region = region.divided((cover.axis,), cover.edge)
        is_low = places[:, cover.axis] <= cover.edge
        low = self.cut_out(tree, cover.low, low_region, places[is_low])
        high = self.cut_out(tree, cover.high, high_region, places[~is_low])
        return merged(Split((cover.axis,), cover.edge, low, high), region, self._joined)

    def _joined(self, one: Leaf, other: Leaf, both: Region) -> Leaf | None:
        found = replace(one, region=both)
        return found if (one.chain, one.evidence) == (other.chain, other.evidence) and self.is_legal(found) else None

    def _within(self, tree: Tree, region: Region, places: Places) -> Tree:
        if isinstance(tree, Leaf):
            return replace(tree, region=region)
        low_region, high_region = region.divided(tree.feature, tree.edge)
        if low_region.is_empty or high_region.is_empty:
            return self._within(tree.high if low_region.is_empty else tree.low, region, places)
        is_low = features_at(places, tree.feature) <= tree.edge
        if not is_low.any() or is_low.all():
            beside = self._within(tree.low if is_low.any() else tree.high, region, places)
            if all(self.is_legal(leaf) for leaf in leaves_of(beside)):
                return beside
        low = self._within(tree.low, low_region, places[is_low])
        high = self._within(tree.high, high_region, places[~is_low])
        return Split(tree.feature, tree.edge, low, high)


def _mixed(served: Mask, cuts: Rows) -> list[float]:
    """How much the places on either side of each cut differ: around a hole no single cut saves anything, and the Gini
    impurity (as in classification trees; Breiman et al. 1984) shows where it ends."""
    weights = np.where(served, 1.0 / max(1, served.sum()), 1.0 / max(1, (~served).sum()))
    sums, held = np.cumsum(weights), np.cumsum(np.where(served, weights, 0.0))
    low, in_low = sums[cuts], held[cuts]
    high, in_high = sums[-1] - low, held[-1] - in_low
    mixed = in_low * (1.0 - in_low / low) + in_high * (1.0 - in_high / high)
    # Not by numpy, whose rounding depends on the last bits of a product.
    return [round(value, 9) for value in mixed.tolist()]
