"""Regions: the sizes at which two entries of one static key differ in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.form import Step
from layerzero_tune.diff.ranges import Ranges, box_of, common, complete, concise, holds
from layerzero_tune.diff.side import EntryKey, SideEntry

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
        """The volume of the box around the region, sizes taken by their logarithms."""
        return math.prod(math.log((high + 1) / low) for low, high in box_of(self.ranges).values())

    def holds(self, sizes: dict[str, int]) -> bool:
        return holds(self.ranges, sizes)


def changed_regions(key: EntryKey, old: SideEntry, new: SideEntry) -> tuple[Region, ...]:
    """Where the chains of two entries differ, within the range that both measured, in order of sizes.

    Both tables are constant on the intersection of a bucket of each; neighbours with the same change become one.
    """
    found: dict[tuple[Chain, Chain], list[Ranges]] = {}
    for before in old.buckets:
        for after in new.buckets:
            both = None if before.chain == after.chain else common(before.ranges, after.ranges)
            if both is not None and _is_served(both, old) and _is_served(both, new):
                found.setdefault((before.chain, after.chain), []).append(both)
    regions = [
        Region(key, ranges, before, after) for (before, after), parts in found.items() for ranges in _joined(parts)
    ]
    return tuple(sorted(regions, key=lambda region: (*box_of(region.ranges).values(), repr(region.ranges))))


def _is_served(ranges: Ranges, entry: SideEntry) -> bool:
    """Whether the smallest sizes are not beyond the entry's largest product."""
    return entry.max_product is None or math.prod(low for low, _ in box_of(ranges).values()) <= entry.max_product


def _joined(parts: Sequence[Ranges]) -> Sequence[Ranges]:
    """The same sizes in fewer parts: those that meet on one axis, or in one feature, and agree on all else become
    one."""
    names = sorted({name for part in parts for name in part})
    joined: Sequence[Ranges] = tuple(complete(part, names) for part in parts)
    count = len(parts) + 1
    while len(joined) < count:
        count = len(joined)
        for name in names:
            joined = tuple(_joined_along(name, joined))
    return tuple(concise(part) for part in joined)


def _joined_along(name: str, parts: Sequence[Ranges]) -> Iterator[Ranges]:
    rows: dict[frozenset[tuple[str, tuple[int, int]]], list[Ranges]] = {}
    for part in parts:
        rows.setdefault(frozenset(item for item in part.items() if item[0] != name), []).append(part)
    for row in rows.values():
        row.sort(key=lambda part: part[name])
        held = row[0]
        for part in row[1:]:
            if held[name][1] + 1 == part[name][0]:
                held = {**held, name: (held[name][0], part[name][1])}
            else:
                yield held
                held = part
        yield held


def sizes_by_axis(entry: SideEntry, sizes: Sizes) -> dict[str, int]:
    return {axis.name: size for axis, size in zip(entry.operation.axes, sizes, strict=True)}
