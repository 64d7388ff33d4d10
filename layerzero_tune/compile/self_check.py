"""The check after emission: the module that was written answers as the form that was meant."""

from __future__ import annotations

from pathlib import Path

from layerzero_runtime.errors import TableError
from layerzero_runtime.operation import Sizes
from layerzero_runtime.table import MISS, Table
from layerzero_runtime.table_files import load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, leaf_at
from layerzero_tune.compile.form import Entry, TableForm
from layerzero_tune.identity import canonical_json


def check_emitted(form: TableForm, folder: Path) -> int:
    """Load the module and replay every measured point and the sizes on both sides of every edge; returns their number.

    Raises:
        TableError: the module cannot be loaded, or answers otherwise than the form; names the entry and the sizes.
    """
    table = load_table_file(folder / MODULE_FILE)
    return sum(_check_entry(table, entry) for entry in form.entries)


def _check_entry(table: Table, entry: Entry) -> int:
    found = table.entries.get(entry.operation, {}).get(entry.static_key)
    if found is None:
        raise TableError(f"{table.name}: no entry for {entry.operation} {entry.static_key}")
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
    inside = all(entry.bounds[axis][0] <= sizes[axis] <= entry.bounds[axis][1] for axis in entry.free)
    product = 1
    for axis in entry.free:
        product *= sizes[axis]
    if not inside or (entry.max_product is not None and product > entry.max_product):
        return ()
    return tuple((*step.choice, step.guards) for step in leaf_at(entry.tree, sizes).chain)


def _probes(entry: Entry) -> set[Sizes]:
    """Measured points, and each corner of each bucket with its neighbours one step outside."""
    probes: set[Sizes] = set()
    for leaf in entry.leaves():
        if leaf.evidence is not None:
            probes.update(leaf.evidence.points)
        corners = [[low - 1, low, high, high + 1] for low, high in leaf.box]
        middle = tuple((low + high) // 2 for low, high in leaf.box)
        for axis, values in enumerate(corners):
            for value in values:
                probes.add((*middle[:axis], value, *middle[axis + 1 :]))
        probes.update((tuple(low for low, _ in leaf.box), tuple(high for _, high in leaf.box)))
    return probes
