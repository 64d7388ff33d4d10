"""Comparing two tables of one device: what changed, and what the measurements say that it is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerzero_tune.compile.judge import TIE_MARGIN, Choice
from layerzero_tune.diff.prediction import Estimate, Predictor
from layerzero_tune.diff.ranges import Ranges, sizes_inside
from layerzero_tune.diff.regions import Region, changed_regions, sizes_by_axis
from layerzero_tune.diff.shapes import Shape
from layerzero_tune.diff.side import EntryKey, Side

Effect = Literal["faster", "slower", "equal", "unknown", "no shape", "guards"]


@dataclass(frozen=True)
class ShapeChange:
    """One shape under both tables; a plan is None where the table misses.

    Attributes:
        gain: log(old plan's time / new plan's time), None where one of them misses or nothing is known.
        time_ns: about how long the new plan takes, None without measurements.
    """

    shape: Shape
    old: Choice | None
    new: Choice | None
    gain: Estimate | None
    time_ns: float | None


@dataclass(frozen=True)
class RegionChange:
    """A region and what it is worth.

    Attributes:
        shapes, weight: how many shapes in it both tables serve, and what they weigh together.
        log_gain: their weighted mean gain, or, without any, the one predicted for the region's middle; None where
            nothing is known.
    """

    region: Region
    shapes: int
    weight: float
    log_gain: float | None

    @property
    def effect(self) -> Effect:
        """What the change is worth; within `TIE_MARGIN` it is "equal"."""
        if not self.region.is_other_plan:
            return "guards"
        if not self.shapes:
            return "no shape"
        if self.log_gain is None:
            return "unknown"
        if abs(self.log_gain) <= math.log1p(TIE_MARGIN):
            return "equal"
        return "faster" if self.log_gain > 0 else "slower"

    @property
    def rank(self) -> tuple[float, float]:
        """What the largest changes are largest in: the log time that a change moves over all its shapes; without any,
        over the extent of its sizes in log space."""
        gain = abs(self.log_gain or 0.0)
        return (gain * self.weight, gain * self.region.extent)


@dataclass(frozen=True)
class CoverageChange:
    """How what one static key covers has changed. A side without the entry has neither ranges nor product.

    Attributes:
        gained, lost: shapes that only the new, only the old table serves.
        regions: sizes inside both ranges that only one of the two serves.
    """

    key: EntryKey
    old: Ranges | None
    new: Ranges | None
    old_product: int | None
    new_product: int | None
    gained: int
    lost: int
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class KernelChange:
    """A kernel whose part in the tables has changed: shapes that it serves, and what it was measured with."""

    kernel_id: str
    old_shapes: int
    new_shapes: int
    old: dict[str, str] | None
    new: dict[str, str] | None


@dataclass(frozen=True)
class Comparison:
    """Two tables side by side. Entries are counted by static key."""

    old: Side
    new: Side
    added: tuple[EntryKey, ...]
    removed: tuple[EntryKey, ...]
    changed: tuple[EntryKey, ...]
    unchanged: int
    shapes: tuple[ShapeChange, ...]
    regions: tuple[RegionChange, ...]
    coverage: tuple[CoverageChange, ...]
    kernels: tuple[KernelChange, ...]

    @property
    def is_same_device(self) -> bool:
        return self.old.device.matches(self.new.device) == "exact"


def compare(old: Side, new: Side, shapes: Sequence[Shape]) -> Comparison:
    """Compare two tables over weighted shapes."""
    predictor = Predictor(old, new)
    shape_changes = tuple(_shape_change(predictor, shape) for shape in shapes)
    by_key: dict[EntryKey, list[ShapeChange]] = {}
    for change in shape_changes:
        by_key.setdefault(change.shape.key, []).append(change)
    both = [key for key in new.entries if key in old.entries]
    regions = {key: changed_regions(key, old.entries[key], new.entries[key]) for key in both}
    served = {key: tuple(region for region in found if region.old and region.new) for key, found in regions.items()}
    coverage = tuple(
        found
        for key in sorted({*old.entries, *new.entries}, key=repr)
        if (found := _coverage(old, new, key, by_key.get(key, ()), regions.get(key, ()))) is not None
    )
    changed = tuple(key for key in both if served[key] or any(change.key == key for change in coverage))
    return Comparison(
        old=old,
        new=new,
        added=tuple(key for key in new.entries if key not in old.entries),
        removed=tuple(key for key in old.entries if key not in new.entries),
        changed=changed,
        unchanged=len(both) - len(changed),
        shapes=shape_changes,
        regions=tuple(_region_change(predictor, region, by_key.get(key, ())) for key in both for region in served[key]),
        coverage=coverage,
        kernels=_kernel_changes(old, new, shape_changes),
    )


def _shape_change(predictor: Predictor, shape: Shape) -> ShapeChange:
    before, after = (side.plan(shape.key, shape.sizes) for side in (predictor.old, predictor.new))
    if before is None or after is None:
        return ShapeChange(shape, before, after, None, None)
    gain = predictor.log_ratio(shape.key, shape.sizes, before, after)
    return ShapeChange(shape, before, after, gain, predictor.time_ns(shape.key, shape.sizes, after))


def _region_change(predictor: Predictor, region: Region, shapes: Sequence[ShapeChange]) -> RegionChange:
    entry = predictor.new.entries[region.key]
    inside = [
        change
        for change in shapes
        if change.old and change.new and region.holds(sizes_by_axis(entry, change.shape.sizes))
    ]
    known = [(change.shape.weight, change.gain.log_ratio) for change in inside if change.gain is not None]
    log_gain: float | None = None
    if known:
        log_gain = math.fsum(weight * gain for weight, gain in known) / math.fsum(weight for weight, _ in known)
    elif not inside:
        middle = sizes_inside(region.ranges)
        estimate = middle and predictor.log_ratio(
            region.key, entry.sizes(middle), region.old[0].choice, region.new[0].choice
        )
        log_gain = estimate.log_ratio if estimate else None
    return RegionChange(region, len(inside), math.fsum(change.shape.weight for change in inside), log_gain)


def _coverage(
    old: Side, new: Side, key: EntryKey, shapes: Sequence[ShapeChange], regions: Sequence[Region]
) -> CoverageChange | None:
    """How the coverage of a static key has changed, None if it has not."""
    before, after = old.entries.get(key), new.entries.get(key)
    change = CoverageChange(
        key=key,
        old=None if before is None else before.ranges,
        new=None if after is None else after.ranges,
        old_product=None if before is None else before.max_product,
        new_product=None if after is None else after.max_product,
        gained=sum(shape.old is None and shape.new is not None for shape in shapes),
        lost=sum(shape.old is not None and shape.new is None for shape in shapes),
        regions=tuple(region for region in regions if not region.old or not region.new),
    )
    is_same = (change.old, change.old_product) == (change.new, change.new_product)
    return None if is_same and not change.regions else change


def _kernel_changes(old: Side, new: Side, shapes: Sequence[ShapeChange]) -> tuple[KernelChange, ...]:
    """The kernels of either table that serve other shapes than before, or were measured with something else."""
    found = []
    for kernel_id in sorted({*old.kernels, *new.kernels}):
        before, after = old.kernels.get(kernel_id), new.kernels.get(kernel_id)
        change = KernelChange(
            kernel_id=kernel_id,
            old_shapes=sum(shape.old is not None and shape.old[0] == kernel_id for shape in shapes),
            new_shapes=sum(shape.new is not None and shape.new[0] == kernel_id for shape in shapes),
            old=None if before is None else dict(before),
            new=None if after is None else dict(after),
        )
        if before != after or change.old_shapes != change.new_shapes:
            found.append(change)
    return tuple(found)
