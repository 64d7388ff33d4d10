"""All tables that a process could look in for a device: which one serves, and why each other does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.tables.table import Table
from layerzero_runtime.tables.table_files import (
    TABLES_VARIABLE,
    TablePlace,
    all_places,
    find_alike,
    find_table,
    load_place,
    newest_first,
)

_GUIDES = "guides calls that no table before it answers"

Standing = Literal["serves", "yields", "approximate", "refused", "other device"]


@dataclass(frozen=True)
class TableCandidate:
    """A table that was found, and what comes of it.

    Attributes:
        name: its module, or its file where the folder of LAYERZERO_TABLES holds it.
        origin: what put it there: LAYERZERO_TABLES, or a distribution with its version.
        slug: of the device that its folder or entry point names.
        table: None where it cannot be loaded.
        standing: "serves" the device, "yields" to a table of the device that goes first, is of an "approximate"ly
            matching device, is "refused", or is of an "other device", from which nothing carries over.
        reason: why, in words.
    """

    name: str
    origin: str
    slug: str
    table: Table | None
    standing: Standing
    reason: str


def table_candidates(device: DeviceSpec) -> tuple[TableCandidate, ...]:
    """The tables that are there, in the order in which they are asked about a call on the device; then those that are
    not asked, by their devices and names."""
    serving, _ = find_table(device)
    order = {table.path: number for number, table in enumerate(find_alike(device))}
    found: list[TableCandidate] = []
    for tier in all_places(device):
        for place in tier:
            try:
                table = load_place(place)
            except TableError as error:
                found.append(_candidate(place, None, "refused", str(error)))
                continue
            if table is not None:
                found.append(_candidate(place, table, *_standing(place, table, device, serving)))

    def rank(candidate: TableCandidate) -> tuple[int, str, str]:
        path = None if candidate.table is None else candidate.table.path
        return (order.get(path, len(order)), candidate.slug, candidate.name)

    return tuple(sorted(found, key=rank))


def _candidate(place: TablePlace, table: Table | None, standing: Standing, reason: str) -> TableCandidate:
    slug, name, origin = place
    return TableCandidate(name, origin, slug, table, standing, reason)


def _standing(place: TablePlace, table: Table, device: DeviceSpec, serving: Table | None) -> tuple[Standing, str]:
    slug, _, origin = place
    if table.device.slug != slug:
        return "refused", f"was compiled for {table.device.slug}, but lies where tables of {slug} do"
    match = table.device.matches(device)
    if match is None:
        return "other device", f"of {table.device.name}"
    if match == "approximate" or serving is None:
        return "approximate", f"of {table.device.name}, which is like this device; {_GUIDES}"
    if table.path == serving.path:
        return "serves", f"{TABLES_VARIABLE} goes first" if origin == TABLES_VARIABLE else "the newest of this device"
    return "yields", f"{_behind(table, serving)}; {_GUIDES}"


def _behind(table: Table, serving: Table) -> str:
    measured, newest = table.provenance["measured_to"], serving.provenance["measured_to"]
    if newest_first((table, serving))[0] is table:
        return f"{TABLES_VARIABLE} goes first"
    if measured < newest:
        return f"older results than those of {serving.name}"
    return f"as new as {serving.name}, which goes first by its name"
