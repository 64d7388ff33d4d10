"""Where to split: the direction and the place after which the fewest buckets follow.

Kernels part along single sizes (a tile is filled, all cores have work) or along products of them (the work in a call).
Cross-validated on results of two CPUs (5,652 cells of each left out; efficiency, p10, buckets): on a Xeon 0.9858,
0.969, 441 with the cheapest split on one axis, 0.9887, 0.987, 216 with products, 0.9887, 0.985, 179 with the fewest
buckets; on an EPYC the last two are 0.9824, 0.956, 290 and 0.9829, 0.960, 232.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from layerzero_tune.compile.cell import Cell
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import Axes, product_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Sizes that lie closer together than this factor share a bucket. What sets them apart is not their magnitude but
# whether they are even or fill whole tiles, which says nothing about the sizes in between.
MIN_STEP = 1.05
# What remains after a split over a product counts this much more, and this much log time beside: one axis is read more
# easily, and what little a product gains beside it may be noise.
_PRODUCT_SURCHARGE = (1.25, 0.001)
# How many buckets a split over a product counts for, beside those that follow.
_PRODUCT_BUCKETS = 0.5


@dataclass(frozen=True)
class Place:
    """Between which sizes (products over the axes) of the cells a split belongs, the best choice of either side, and
    whether these suit all cells."""

    axes: Axes
    low: int
    high: int
    sides: tuple[Choice, Choice]
    is_clean: bool


def best_place(cells: Sequence[Cell], free: Axes) -> Place | None:
    """Of the cheapest places in each direction, the one after which the fewest buckets follow where each further split
    is the cheapest; None where all cells lie closer together than `MIN_STEP`."""
    ground = _Ground.of(cells, free)
    everything = np.arange(len(cells))
    places = ground.places(everything)
    if len(places) < 2 or places[0].is_clean:
        return places[0] if places else None
    best, fewest = places[0], math.inf
    for place in places:
        buckets = ground.buckets_after(everything, place, fewest)
        if buckets < fewest:
            best, fewest = place, buckets
    return best


@dataclass(frozen=True)
class _Ground:
    """Cells as arrays, of which the rows are looked at that lie on one side of the splits before.

    Attributes:
        choices: those that are acceptable in any cell, ascending.
        costs, acceptable: (cells, choices).
        sizes: the sizes of the cells (products over the axes) in each direction.
        alike: (pairs, 2), cells that lie closer together than `MIN_STEP` on every axis.
        holes: which cells were not measured.
    """

    choices: Sequence[Choice]
    costs: NDArray[np.float64]
    acceptable: NDArray[np.bool_]
    sizes: Mapping[Axes, NDArray[Any]]
    alike: NDArray[np.intp]
    holes: NDArray[np.bool_]

    @classmethod
    def of(cls, cells: Sequence[Cell], free: Axes) -> Self:
        choices = sorted({choice for cell in cells for choice in cell.acceptable})
        directions = (axes for count in range(1, len(free) + 1) for axes in combinations(free, count))
        return cls(
            choices,
            np.array([[cell.cost(choice) for choice in choices] for cell in cells]),
            np.array([[choice in cell.acceptable for choice in choices] for cell in cells]),
            {axes: np.array([product_of(cell.sizes, axes) for cell in cells]) for axes in directions},
            _alike(cells),
            np.array([cell.verdict is None for cell in cells]),
        )

    def places(self, rows: NDArray[np.intp]) -> Sequence[Place]:
        """The best place in each direction, in order of what remains after it. Of places that cost the same it is the
        one on the fewest axes and with the most even sides, so that the tree stays shallow."""
        entering = np.flatnonzero(self.acceptable[rows].any(axis=0))
        costs = self.costs[np.ix_(rows, entering)]
        pairs = self._pairs_among(rows)
        has_holes = bool(self.holes[rows].any())
        found: list[tuple[tuple[float, int, int, Axes], Place]] = []
        for axes, all_sizes in self.sizes.items():
            if has_holes and len(axes) > 1:  # a product would join what was not measured to cells far away
                continue
            order = np.argsort(all_sizes[rows], kind="stable")
            sizes = all_sizes[rows][order]
            low_sums = np.cumsum(costs[order], axis=0)
            high_sums = low_sums[-1] - low_sums
            # Not numpy's rounding, which depends on the last bits of a product.
            left = np.array([round(cost, 9) for cost in (low_sums.min(axis=1) + high_sums.min(axis=1))[:-1].tolist()])
            low, high = sizes[:-1], sizes[1:]
            allowed = (high > low) & ~_parted(order, pairs)
            if len(axes) == 1:
                allowed &= high >= low * MIN_STEP
            candidates = np.flatnonzero(allowed)
            if not len(candidates):
                continue
            cheapest = candidates[left[candidates] == left[candidates].min()]
            uneven = np.abs(2 * (cheapest + 1) - len(order))
            last = int(cheapest[uneven.argmin()])
            total = float(left[last])
            if len(axes) > 1:
                total = round(total * _PRODUCT_SURCHARGE[0] + _PRODUCT_SURCHARGE[1], 9)
            low_side, high_side = (self.choices[entering[sums[last].argmin()]] for sums in (low_sums, high_sums))
            place = Place(
                axes, int(low[last]), int(high[last]), (low_side, high_side), is_clean=bool(left[last] == 0.0)
            )
            found.append(((total, len(axes), int(uneven.min()), axes), place))
        return [place for _, place in sorted(found, key=lambda item: item[0])]

    def buckets_after(self, rows: NDArray[np.intp], place: Place, limit: float) -> float:
        """How many buckets follow, infinitely many if they are not fewer than the limit."""
        is_low = self.sizes[place.axes][rows] <= place.low
        found = _PRODUCT_BUCKETS * (len(place.axes) > 1)
        found += self._buckets(rows[is_low], limit - found - 1.0)
        return found + self._buckets(rows[~is_low], limit - found)

    def _buckets(self, rows: NDArray[np.intp], limit: float) -> float:
        if limit <= 1.0:
            return math.inf
        if self.acceptable[rows].all(axis=0).any():
            return 1.0
        places = self.places(rows)
        return self.buckets_after(rows, places[0], limit) if places else 1.0

    def _pairs_among(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """The pairs that are alike, as positions in `rows`; those with one cell elsewhere are parted already."""
        positions = np.full(len(self.holes), -1)
        positions[rows] = np.arange(len(rows))
        pairs = positions[self.alike]
        return pairs[(pairs >= 0).all(axis=1)]


def _alike(cells: Sequence[Cell]) -> NDArray[np.intp]:
    sizes = np.array([cell.sizes for cell in cells])
    one, other = sizes[:, None, :], sizes[None, :, :]
    # No logarithms, whose last bits differ between machines: sizes may lie just this factor apart.
    factors = (np.maximum(one, other) / np.minimum(one, other)).max(axis=2)
    return np.argwhere(np.triu(factors < MIN_STEP, k=1))


def _parted(order: NDArray[np.intp], pairs: NDArray[np.intp]) -> NDArray[np.bool_]:
    """At which positions in an order of cells, but the last, a split behind them would part one of the pairs."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    ends = np.sort(places[pairs], axis=1)
    opened = np.zeros(len(order), dtype=np.intp)
    np.add.at(opened, ends[:, 0], 1)
    np.add.at(opened, ends[:, 1], -1)
    return (np.cumsum(opened) > 0)[:-1]
