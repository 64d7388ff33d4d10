"""A region of the key space: a box, and ranges of further features where edges run across the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.feature import Axes, Feature, Range, feature_at, order_of, span
from layerzero_tune.compile.wave_balance import WaveBalance

Box = tuple[Range, ...]  # the range of each axis


@dataclass(frozen=True)
class Region:
    """Sizes that a series of splits sets apart.

    Attributes:
        box: the smallest box around the region.
        free: axes that are not tied under the static key; a tied one repeats the axis before it.
        beside: ranges of features that the box alone does not imply, of products and of the balance of waves.
    """

    box: Box
    free: Axes
    beside: tuple[tuple[Feature, Range], ...] = ()

    @property
    def is_empty(self) -> bool:
        ranges = (*self.box, *(bounds for _, bounds in self.beside))
        return any(low > high for low, high in ranges)

    def holds(self, sizes: Sizes) -> bool:
        inside = all(low <= size <= high for size, (low, high) in zip(sizes, self.box, strict=True))
        return inside and all(low <= feature_at(sizes, feature) <= high for feature, (low, high) in self.beside)

    def divided(self, feature: Feature, edge: int) -> tuple[Region, Region]:
        """Both halves: where the feature is at most the edge, and where it is above."""
        return self.within(feature, None, edge), self.within(feature, edge, None)

    def within(self, feature: Feature, above: int | None, up_to: int | None) -> Region:
        """The part in which the feature is above the one and at most the other; None is no bound."""
        ranges = {axis: self.box[axis] for axis in self.free}
        beside = dict(self.beside)
        low, high = beside.get(feature, span(feature, ranges))
        beside[feature] = (low if above is None else max(low, above + 1), high if up_to is None else min(high, up_to))
        _tighten(ranges, {each: bounds for each, bounds in beside.items() if not isinstance(each, WaveBalance)})
        box: list[Range] = []
        for axis in range(len(self.box)):
            box.append(ranges[axis] if axis in ranges else box[-1])
        return Region(tuple(box), self.free, tuple(_told(ranges, beside)))


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


def _told(ranges: Mapping[int, Range], beside: Mapping[Feature, Range]) -> Iterator[tuple[Feature, Range]]:
    """The features whose ranges are not implied by the sizes' own."""
    for feature in sorted(beside, key=order_of):
        (low, high), (least, most) = beside[feature], span(feature, ranges)
        if low > least or high < most:
            yield feature, (max(low, least), min(high, most))
