"""The check after emission: the module that was written answers as the form that was meant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.operation import Sizes
from layerzero_runtime.tables.table import MISS, Table
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, leaf_at
from layerzero_tune.compile.feature import Axes, Range, feature_at
from layerzero_tune.compile.form import Entry, TableForm
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.wave_balance import WaveBalance
from layerzero_tune.identity import canonical_json

# How many sizes of a bucket are looked at for those that come nearest to an edge across the axes.
_TRIED = 128
# The same for an edge over a balance of waves, which lies anywhere.
_SPREAD = 1024


def check_emitted(form: TableForm, folder: Path) -> int:
    """Load the module and replay every measured point and the sizes on both sides of every edge; returns their number.

    Raises:
        TableError: the module cannot be loaded, or says otherwise than the form; names the entry and the sizes.
    """
    table = load_table_file(folder / MODULE_FILE)
    _check_whole(table, form)
    return sum(_check_entry(table, entry) for entry in form.entries)


def _check_whole(table: Table, form: TableForm) -> None:
    meant = {(entry.operation, entry.static_key) for entry in form.entries}
    held = {(operation, key) for operation, entries in table.entries.items() for key in entries}
    for operation, key in sorted(held ^ meant, key=repr):
        expected = "no entry was meant" if (operation, key) in held else "no entry"
        raise TableError(f"{table.name}: {expected} for {operation} {key}")
    parts = (
        ("DEVICE", table.device, DeviceSpec.from_dict(form.device)),
        ("PROVENANCE", table.provenance, form.provenance),
        ("KERNELS", table.kernels, form.kernels),
    )
    for name, found, expected_part in parts:
        if found != expected_part:
            raise TableError(f"{table.name}: {name} is {found}, expected {expected_part}")


def _check_entry(table: Table, entry: Entry) -> int:
    found = table.entries[entry.operation][entry.static_key]
    probes = _probes(entry)
    for sizes in sorted(probes):
        expected = _expected_chain(entry, sizes)
        leaf = found.decide(*sizes)
        answered = () if leaf == MISS else found.leaves[leaf]
        actual = tuple((step.kernel_id, canonical_json(dict(step.configuration)), step.guards) for step in answered)
        if actual != expected:
            raise TableError(
                f"{table.name}: {entry.operation} {entry.static_key} at {sizes} gives {actual}, expected {expected}"
            )
    return len(probes)


def _expected_chain(entry: Entry, sizes: Sizes) -> tuple[tuple[object, ...], ...]:
    if not entry.covers(sizes):
        return ()
    return tuple((*step.choice, step.guards) for step in leaf_at(entry.tree, sizes).chain)


def _probes(entry: Entry) -> set[Sizes]:
    """Measured points, the middle and the corners of each bucket with their neighbours one step outside, the sizes
    around the largest product, and those of each bucket that come nearest to an edge across the axes."""
    probes: set[Sizes] = set()
    for leaf in entry.leaves():
        if leaf.evidence is not None:
            probes.update(leaf.evidence.points)
        box = [leaf.region.box[axis] for axis in entry.free]
        middle = tuple((low + high) // 2 for low, high in box)
        found = {middle, *itertools.product(*({low - 1, low, high, high + 1} for low, high in box))}
        if entry.max_product is not None:
            found.update(_around_product(found, entry.max_product))
        probes.update(_on_axes(sizes, entry.free, len(entry.axes)) for sizes in found)
        probes.update(_on_axes(sizes, entry.free, len(entry.axes)) for sizes in _nearest_to_edges(leaf.region))
    return probes


def _around_product(corners: Iterable[Sizes], max_product: int) -> Iterator[Sizes]:
    """For each corner and axis the sizes just within the product and just beyond it."""
    for corner in tuple(corners):
        for axis in range(len(corner)):
            others = math.prod(corner[:axis] + corner[axis + 1 :])
            for size in (max_product // others, max_product // others + 1) if others else ():
                yield (*corner[:axis], size, *corner[axis + 1 :])


def _nearest_to_edges(region: Region) -> Iterator[Sizes]:
    """Of each range of a feature the sizes on the free axes at which it is smallest and largest, among those tried."""
    for feature, bounds in region.beside:
        tried = _spread(region) if isinstance(feature, WaveBalance) else _with_products(region, feature, bounds)
        found: dict[int, Sizes] = {}
        for free in tried:
            sizes = _on_axes(free, region.free, len(region.box))
            if region.holds(sizes):
                found[feature_at(sizes, feature)] = free
        yield from (found[bound] for bound in {min(found), max(found)}) if found else ()


def _with_products(region: Region, axes: Axes, bounds: Range) -> Iterator[Sizes]:
    """Combinations of sizes on all free axes but one, with the sizes there whose products come next to the bounds."""
    last = max(axes, key=lambda axis: region.box[axis][1] - region.box[axis][0])
    others = tuple(axis for axis in region.free if axis != last)
    for tried in itertools.product(*(_some_of(region.box[axis], len(others)) for axis in others)):
        sizes = dict(zip(others, tried, strict=True))
        rest = math.prod(sizes[axis] for axis in axes if axis != last)
        for size in (-(-bounds[0] // rest), bounds[1] // rest):
            yield tuple({**sizes, last: size}[axis] for axis in region.free)


def _spread(region: Region) -> Iterator[Sizes]:
    """Combinations of sizes on all free axes that lie evenly, in log space, over the box."""
    steps = round(_SPREAD ** (1.0 / len(region.free))) - 1
    boxes = (region.box[axis] for axis in region.free)
    lines = ({round(low * (high / low) ** (step / steps)) for step in range(steps + 1)} for low, high in boxes)
    return itertools.product(*map(sorted, lines))


def _some_of(bounds: Range, count: int) -> Sequence[int]:
    """Sizes of a range, those next to its ends first, so that all combinations over this many axes are `_TRIED`."""
    sizes = range(bounds[0], bounds[1] + 1)
    half = round(_TRIED ** (1.0 / count)) // 2
    return sizes if len(sizes) <= 2 * half else [*sizes[:half], *sizes[-half:]]


def _on_axes(sizes: Sizes, free: Axes, count: int) -> Sizes:
    """The sizes with those of tied axes, which repeat the axis before them."""
    full: list[int] = []
    for axis in range(count):
        full.append(sizes[free.index(axis)] if axis in free else full[-1])
    return tuple(full)
