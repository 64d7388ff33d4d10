"""Regions: the sizes at which two entries of one static key differ in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.form import Step
from layerzero_tune.diff.side import EntryKey, Ranges, SideEntry

Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Region:
    """Sizes at which the old table has one chain of plans and the new one another; an empty chain is a miss."""

    key: EntryKey
    ranges: Ranges
    old: Chain
    new: Chain

    @property
    def is_other_plan(self) -> bool:
        """Whether the first plans differ, not only guards or what stands behind them."""
        return [step.choice for step in self.old[:1]] != [step.choice for step in self.new[:1]]

    @property
    def extent(self) -> float:
        """The volume of the region, sizes taken by their logarithms."""
        return math.prod(math.log((high + 1) / low) for low, high in self.ranges.values())

    def holds(self, sizes: dict[str, int]) -> bool:
        return all(low <= sizes[name] <= high for name, (low, high) in self.ranges.items())


def changed_regions(key: EntryKey, old: SideEntry, new: SideEntry) -> tuple[Region, ...]:
    """Where the chains of two entries differ, within the range that both measured, in order of sizes.

    Both tables are constant on the intersection of a bucket of each; neighbours with the same change become one.
    """
    boxes: dict[tuple[Chain, Chain], list[Ranges]] = {}
    for before in old.buckets:
        for after in new.buckets:
            box = {
                name: (max(low, after.ranges[name][0]), min(high, after.ranges[name][1]))
                for name, (low, high) in before.ranges.items()
            }
            if before.chain != after.chain and _is_served(box, old) and _is_served(box, new):
                boxes.setdefault((before.chain, after.chain), []).append(box)
    regions = [
        Region(key, box, before, after) for (before, after), found in boxes.items() for box in _joined(tuple(found))
    ]
    return tuple(sorted(regions, key=lambda region: tuple(region.ranges.values())))


def _is_served(box: Ranges, entry: SideEntry) -> bool:
    """Whether sizes lie in the box, the smallest of them not beyond the entry's largest product."""
    if any(low > high for low, high in box.values()):
        return False
    return entry.max_product is None or math.prod(low for low, _ in box.values()) <= entry.max_product


def _joined(boxes: Sequence[Ranges]) -> Sequence[Ranges]:
    """The same sizes in fewer boxes: those that meet on one axis and agree on the others become one."""
    while True:
        joined: Sequence[Ranges] = boxes
        for name in boxes[0]:
            joined = tuple(_joined_along(name, joined))
        if len(joined) == len(boxes):
            return boxes
        boxes = joined


def _joined_along(name: str, boxes: Sequence[Ranges]) -> Iterator[Ranges]:
    rows: dict[tuple[tuple[int, int], ...], list[Ranges]] = {}
    for box in boxes:
        rows.setdefault(tuple(bounds for other, bounds in box.items() if other != name), []).append(box)
    for row in rows.values():
        row.sort(key=lambda box: box[name])
        held = row[0]
        for box in row[1:]:
            if held[name][1] + 1 == box[name][0]:
                held = {**held, name: (held[name][0], box[name][1])}
            else:
                yield held
                held = box
        yield held


def sizes_by_axis(entry: SideEntry, sizes: Sizes) -> dict[str, int]:
    return {axis.name: size for axis, size in zip(entry.operation.axes, sizes, strict=True)}
