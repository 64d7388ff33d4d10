"""The check after emission: the module that was written answers as the form that was meant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.operation import Sizes
from layerzero_runtime.tables.table import MISS, Table
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, leaf_at
from layerzero_tune.compile.form import Entry, TableForm
from layerzero_tune.identity import canonical_json


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
    """Measured points, the middle and the corners of each bucket with their neighbours one step outside, and the sizes
    around the largest product."""
    probes: set[Sizes] = set()
    for leaf in entry.leaves():
        if leaf.evidence is not None:
            probes.update(leaf.evidence.points)
        box = [leaf.box[axis] for axis in entry.free]
        middle = tuple((low + high) // 2 for low, high in box)
        found = {middle, *itertools.product(*({low - 1, low, high, high + 1} for low, high in box))}
        if entry.max_product is not None:
            found.update(_around_product(found, entry.max_product))
        probes.update(_on_all_axes(sizes, entry) for sizes in found)
    return probes


def _around_product(corners: Iterable[Sizes], max_product: int) -> Iterator[Sizes]:
    """For each corner and axis the sizes just within the product and just beyond it."""
    for corner in tuple(corners):
        for axis in range(len(corner)):
            others = math.prod(corner[:axis] + corner[axis + 1 :])
            for size in (max_product // others, max_product // others + 1) if others else ():
                yield (*corner[:axis], size, *corner[axis + 1 :])


def _on_all_axes(sizes: Sizes, entry: Entry) -> Sizes:
    """The sizes with those of tied axes, which repeat the axis before them."""
    full: list[int] = []
    for axis in range(len(entry.axes)):
        full.append(sizes[entry.free.index(axis)] if axis in entry.free else full[-1])
    return tuple(full)
