"""Where to split: the direction and the place whose two sides cost least when each gets its one best choice."""

from __future__ import annotations

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
# easily. Cross-validated on the committed results (5,652 cells left out), efficiency and buckets: 0.9858 and 441 with
# single axes alone, 0.9876 and 435 with products at no surcharge, 0.9886 and 431 so.
_PRODUCT_SURCHARGE = (1.25, 0.001)


@dataclass(frozen=True)
class Place:
    """Between which sizes (products over the axes) of the cells a split belongs, and the best choice of either side."""

    axes: Axes
    low: int
    high: int
    sides: tuple[Choice, Choice]


def best_place(cells: Sequence[Cell], free: Axes) -> Place | None:
    """Of places that cost the same the one on the fewest axes and with the most even sides, so that the tree stays
    shallow; None where all cells lie closer together than `MIN_STEP`."""
    choices = sorted({choice for cell in cells for choice in cell.acceptable})
    costs = np.array([[cell.cost(choice) for choice in choices] for cell in cells])
    best: tuple[tuple[float, int, int, Axes], Place] | None = None
    for axes in _directions(free):
        order = sorted(range(len(cells)), key=lambda index, axes=axes: product_of(cells[index].sizes, axes))  # type: ignore[misc]
        sizes = [product_of(cells[index].sizes, axes) for index in order]
        low_sums = np.cumsum(costs[order], axis=0)
        high_sums = low_sums[-1] - low_sums
        for last, (low, high) in enumerate(pairwise(sizes)):
            if high < low * MIN_STEP:
                continue
            total = float(low_sums[last].min() + high_sums[last].min())
            if len(axes) > 1:
                total = total * _PRODUCT_SURCHARGE[0] + _PRODUCT_SURCHARGE[1]
            rank = (round(total, 9), len(axes), abs(2 * (last + 1) - len(order)), axes)
            if best is None or rank < best[0]:
                sides = choices[int(low_sums[last].argmin())], choices[int(high_sums[last].argmin())]
                best = rank, Place(axes, low, high, sides)
    return None if best is None else best[1]


def _directions(free: Axes) -> Iterator[Axes]:
    """Every axis, then every product of several: kernels differ by the work in a call as much as by single sizes."""
    for count in range(1, len(free) + 1):
        yield from combinations(free, count)
