"""Where to split: the direction and the place after which the fewest buckets follow.

Kernels part along single sizes (a tile is filled, all cores have work) or along products of them (the work in a call).
Cross-validated on results of two CPUs (5,652 cells of each left out; efficiency, p10, buckets): on a Xeon 0.9858,
0.969, 441 with the cheapest split on one axis, 0.9887, 0.987, 216 with products, 0.9887, 0.985, 179 with the fewest
buckets; on an EPYC the last two are 0.9824, 0.956, 290 and 0.9829, 0.960, 232.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from layerzero_tune.compile.cell import Cell
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import Axes, product_of

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
    places = _places(cells, free)
    if len(places) < 2 or places[0].is_clean:
        return places[0] if places else None
    return min(places, key=lambda place: _buckets_after(cells, place, free))


def _buckets_after(cells: Sequence[Cell], place: Place, free: Axes) -> float:
    sides = (
        [cell for cell in cells if (product_of(cell.sizes, place.axes) <= place.low) == low] for low in (True, False)
    )
    return math.fsum(_buckets(side, free) for side in sides) + _PRODUCT_BUCKETS * (len(place.axes) > 1)


def _buckets(cells: Sequence[Cell], free: Axes) -> float:
    if frozenset.intersection(*(cell.acceptable for cell in cells)):
        return 1.0
    places = _places(cells, free)
    return _buckets_after(cells, places[0], free) if places else 1.0


def _places(cells: Sequence[Cell], free: Axes) -> Sequence[Place]:
    """The best place in each direction, in order of what remains after it. Of places that cost the same it is the one
    on the fewest axes and with the most even sides, so that the tree stays shallow."""
    choices = sorted({choice for cell in cells for choice in cell.acceptable})
    costs = np.array([[cell.cost(choice) for choice in choices] for cell in cells])
    alike = _alike(cells)
    found: list[tuple[tuple[float, int, int, Axes], Place]] = []
    for axes in _directions(free, cells):
        order = sorted(range(len(cells)), key=lambda index, axes=axes: product_of(cells[index].sizes, axes))  # type: ignore[misc]
        sizes = [product_of(cells[index].sizes, axes) for index in order]
        low_sums = np.cumsum(costs[order], axis=0)
        high_sums = low_sums[-1] - low_sums
        best: tuple[tuple[float, int, int, Axes], Place] | None = None
        parted = _parted(order, alike)
        for last, (low, high) in enumerate(pairwise(sizes)):
            if high == low or (len(axes) == 1 and high < low * MIN_STEP) or last in parted:
                continue
            left = round(float(low_sums[last].min() + high_sums[last].min()), 9)
            total = left if len(axes) == 1 else left * _PRODUCT_SURCHARGE[0] + _PRODUCT_SURCHARGE[1]
            rank = (round(total, 9), len(axes), abs(2 * (last + 1) - len(order)), axes)
            if best is None or rank < best[0]:
                sides = choices[int(low_sums[last].argmin())], choices[int(high_sums[last].argmin())]
                best = rank, Place(axes, low, high, sides, is_clean=left == 0.0)
        if best is not None:
            found.append(best)
    return [place for _, place in sorted(found, key=lambda item: item[0])]


def _alike(cells: Sequence[Cell]) -> Sequence[tuple[int, int]]:
    """Pairs of cells that lie closer together than `MIN_STEP` on every axis."""
    sizes = np.array([cell.sizes for cell in cells])
    one, other = sizes[:, None, :], sizes[None, :, :]
    # No logarithms, whose last bits differ between machines: sizes may lie just this factor apart.
    factors = (np.maximum(one, other) / np.minimum(one, other)).max(axis=2)
    first, second = np.nonzero(np.triu(factors < MIN_STEP, k=1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def _parted(order: Sequence[int], pairs: Sequence[tuple[int, int]]) -> frozenset[int]:
    """The positions in an order of cells after which a split would part one of the pairs."""
    places = {cell: place for place, cell in enumerate(order)}
    ends = (sorted((places[first], places[second])) for first, second in pairs)
    return frozenset(place for low, high in ends for place in range(low, high))


def _directions(free: Axes, cells: Sequence[Cell]) -> Iterator[Axes]:
    """Every axis, then every product of several; around sizes that were not measured axes alone, for a product would
    join them to others far away."""
    has_holes = any(cell.verdict is None for cell in cells)
    for count in range(1, 2 if has_holes else len(free) + 1):
        yield from combinations(free, count)
