"""The bounds of what is asked for under one static key, and which of them contests have reached."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from layerzero_runtime.operation import Sizes

# The largest product of the sizes, beside (axis, 0) for its smallest size and (axis, 1) for its largest.
_PRODUCT = (-1, 1)


class DemandBounds:
    """The smallest and largest sizes on each free axis, and the largest product: a table answers inside the measured
    ranges alone.

    Args:
        demand: the sizes that are asked for, at least one.
        free: the axes that count.
    """

    def __init__(self, demand: Collection[Sizes], free: Sequence[int]) -> None:
        self._free = tuple(free)
        self._ranges = {axis: (min(s[axis] for s in demand), max(s[axis] for s in demand)) for axis in free}
        self._largest_product = max(math.prod(sizes[axis] for axis in free) for sizes in demand)
        self._reached: set[tuple[int, int]] = set()

    def reach(self, sizes: Sizes) -> None:
        """Take in a contest at these sizes."""
        self._reached |= self._at(sizes)

    def new_at(self, sizes: Sizes) -> int:
        """How many bounds a contest at these sizes would be the first to reach."""
        return len(self._at(sizes) - self._reached)

    def _at(self, sizes: Sizes) -> set[tuple[int, int]]:
        reached = {
            (axis, side)
            for axis, bounds in self._ranges.items()
            for side, bound in enumerate(bounds)
            if (sizes[axis] >= bound if side else sizes[axis] <= bound)
        }
        is_largest = math.prod(sizes[axis] for axis in self._free) >= self._largest_product
        return reached | {_PRODUCT} if is_largest else reached
