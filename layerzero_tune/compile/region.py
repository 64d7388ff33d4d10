"""A region of the key space: a box, and ranges of products of its sizes where edges run across the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.operation import Sizes

Range = tuple[int, int]  # inclusive
Box = tuple[Range, ...]  # the range of each axis
Axes = tuple[int, ...]  # one axis, or those whose sizes are multiplied, ascending


@dataclass(frozen=True)
class Region:
    """Sizes that a series of splits sets apart.

    Attributes:
        box: the smallest box around the region.
        free: axes that are not tied under the static key; a tied one repeats the axis before it.
        products: ranges of products of sizes that the box alone does not imply, by axes.
    """

    box: Box
    free: Axes
    products: tuple[tuple[Axes, Range], ...] = ()

    @property
    def is_empty(self) -> bool:
        ranges = (*self.box, *(bounds for _, bounds in self.products))
        return any(low > high for low, high in ranges)

    def holds(self, sizes: Sizes) -> bool:
        inside = all(low <= size <= high for size, (low, high) in zip(sizes, self.box, strict=True))
        return inside and all(low <= product_of(sizes, axes) <= high for axes, (low, high) in self.products)

    def divided(self, axes: Axes, edge: int) -> tuple[Region, Region]:
        """Both halves: where the product over the axes is at most the edge, and where it is above."""
        return self.within(axes, None, edge), self.within(axes, edge, None)

    def within(self, axes: Axes, above: int | None, up_to: int | None) -> Region:
        """The part in which the product over the axes is above the one and at most the other; None is no bound."""
        ranges = {axis: self.box[axis] for axis in self.free}
        products = dict(self.products)
        low, high = products.get(axes, (1, math.prod(ranges[axis][1] for axis in axes)))
        products[axes] = (low if above is None else max(low, above + 1), high if up_to is None else min(high, up_to))
        _tighten(ranges, products)
        box: list[Range] = []
        for axis in range(len(self.box)):
            box.append(ranges[axis] if axis in ranges else box[-1])
        return Region(tuple(box), self.free, tuple(_told(ranges, products)))


def product_of(sizes: Sequence[int], axes: Axes) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _tighten(ranges: dict[int, Range], products: Mapping[Axes, Range]) -> None:
    """Narrow each axis to the sizes that the products allow beside some sizes of the others."""
    before: dict[int, Range] = {}
    while before != ranges:
        before = dict(ranges)
        for axes, (low, high) in products.items():
            for axis in axes:
                if any(first > last for first, last in ranges.values()):
                    return  # empty
                least = math.prod(ranges[other][0] for other in axes if other != axis)
                most = math.prod(ranges[other][1] for other in axes if other != axis)
                ranges[axis] = (max(ranges[axis][0], -(-low // most)), min(ranges[axis][1], high // least))


def _told(ranges: Mapping[int, Range], products: Mapping[Axes, Range]) -> Iterator[tuple[Axes, Range]]:
    """The products whose ranges are not implied by the sizes' own."""
    for axes, (low, high) in sorted(products.items()):
        least, most = (math.prod(ranges[axis][side] for axis in axes) for side in (0, 1))
        if low > least or high < most:
            yield axes, (max(low, least), min(high, most))
