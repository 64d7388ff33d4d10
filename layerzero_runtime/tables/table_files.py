"""Finding the tables of a device: a folder named by LAYERZERO_TABLES first, then the installed ones, newest first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.tables.declared_tables import declared_tables
from layerzero_runtime.tables.table import Table, load_table

if TYPE_CHECKING:
    from pathlib import Path

TABLES_VARIABLE = "LAYERZERO_TABLES"
INSTALLED_PACKAGE = "layerzero_tables"
OWN_DISTRIBUTION = "layerzero-dispatch"

# Where a table may lie: the slug of its device, its file or module, and what put it there (`TABLES_VARIABLE` or a
# distribution).
TablePlace = tuple[str, str, str]

# Sources that passed the checks, by content hash.
_checked: set[bytes] = set()


def load_table_file(path: Path) -> Table:
    """Load a table given by path: its source is checked before it runs, and its leaves after, once per content.

    Raises:
        TableError: the file cannot be read, holds more than literals and decisions, or has another schema.
    """
    import hashlib

    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from error
    digest = hashlib.sha256(source.encode()).digest()
    if digest not in _checked:
        from layerzero_runtime.tables.table_syntax import check_table_source

        check_table_source(source, str(path))
    module = ModuleType(path.parent.name)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (NameError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a generated table: {error}; compile the results again") from error
    table = load_table(module)
    if digest not in _checked:
        table.check()
        _checked.add(digest)
    return table


def check_device(table: Table, device: DeviceSpec) -> None:
    """Refuse a table of another device.

    Raises:
        TableError: it does not match the device exactly.
    """
    if table.device.matches(device) != "exact":
        raise TableError(
            f"{table.path or table.name} was compiled for {table.device.slug}, this device is {device.slug}; "
            "compile results of this device, or move the table to its own device's folder"
        )


def find_table(device: DeviceSpec) -> tuple[Table | None, tuple[TableError, ...]]:
    """The table that serves a device, and the errors of tables that had to be skipped.

    Only a table of exactly this device serves: that of the named folder, else of the installed ones the one with the
    newest results, of equally new ones the first by name.
    """
    skipped: list[TableError] = []
    for places in (_named_places([device.slug]), _installed_places([device.slug])):
        found: list[Table] = []
        for place in places:
            if place[0] != device.slug:
                continue
            try:
                table = load_place(place)
                if table is not None:
                    check_device(table, device)
                    found.append(table)
            except TableError as error:
                skipped.append(error)
        if found:
            return newest_first(found)[0], tuple(skipped)
    return None, tuple(skipped)


def find_alike(device: DeviceSpec) -> tuple[Table, ...]:
    """The tables that say something of a device: those of exactly this one in the order in which they may serve it,
    then those of approximately matching ones, the most alike first. Those that cannot be used are left out."""
    found: list[Table] = []
    for places in all_places(device):
        tables: list[Table] = []
        for place in places:
            try:
                table = load_place(place)
            except TableError:
                continue  # reported where it is the table of the device in use
            if table is not None and table.device.slug == place[0] and table.device.matches(device) is not None:
                tables.append(table)
        found += newest_first(tables)
    return tuple(sorted(found, key=lambda table: _unlikeness(table.device, device)))


def newest_first(tables: Iterable[Table]) -> list[Table]:
    """Tables by the time of their newest measurement, equally new ones by name."""
    by_name = sorted(tables, key=lambda table: table.name)
    return sorted(by_name, key=lambda table: table.provenance["measured_to"], reverse=True)


def _unlikeness(measured: DeviceSpec, device: DeviceSpec) -> tuple[bool, float, str]:
    is_exact = measured.matches(device) == "exact"
    return (not is_exact, 0.0 if is_exact else device.distance(measured), measured.slug)


def all_places(device: DeviceSpec) -> tuple[Sequence[TablePlace], Sequence[TablePlace]]:
    """Where a table of the device would lie, and where others do: in the named folder, and among the installed ones."""
    named, installed = ({device.slug, *slugs} for slugs in (_named_slugs(), _installed_slugs()))
    return _named_places(sorted(named)), _installed_places(sorted(installed))


def _named_places(slugs: Iterable[str]) -> list[TablePlace]:
    folder = os.environ.get(TABLES_VARIABLE)
    return [(slug, os.path.join(folder, slug, "__init__.py"), TABLES_VARIABLE) for slug in slugs] if folder else []


def _installed_places(slugs: Iterable[str]) -> list[TablePlace]:
    """Places of our own distribution for these slugs, and all that other distributions declare."""
    return [*((slug, f"{INSTALLED_PACKAGE}.{slug}", OWN_DISTRIBUTION) for slug in slugs), *declared_tables()]


def _named_slugs() -> list[str]:
    folder = os.environ.get(TABLES_VARIABLE)
    return _folders_with_tables(folder) if folder else []


def _installed_slugs() -> list[str]:
    from importlib.util import find_spec

    package = find_spec(INSTALLED_PACKAGE)
    places = [] if package is None else list(package.submodule_search_locations or ())
    return [slug for place in places for slug in _folders_with_tables(place)]


def _folders_with_tables(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if os.path.isfile(os.path.join(folder, name, "__init__.py"))]


def load_place(place: TablePlace) -> Table | None:
    """The table at a place; None where the named folder or our own distribution has none for the slug.

    Raises:
        TableError: it cannot be used.
    """
    _, name, origin = place
    table = _load_named(name) if origin == TABLES_VARIABLE else _load_installed(name, origin)
    if table is None:
        return None
    provenance = table.provenance if isinstance(table.provenance, Mapping) else {}
    if not isinstance(provenance.get("measured_to"), str):  # which decides between tables
        raise TableError(f"{name}: PROVENANCE does not say measured_to; compile the results again")
    return table


def _load_named(name: str) -> Table | None:
    from pathlib import Path

    path = Path(name)
    if not path.parents[1].is_dir():
        folder = os.environ.get(TABLES_VARIABLE)
        raise TableError(f"{TABLES_VARIABLE} is {folder!r}, which is not a folder; name one that holds tables")
    return load_table_file(path) if path.is_file() else None


def _load_installed(name: str, distribution: str) -> Table | None:
    try:
        __import__(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        is_missing = missing is not None and (name == missing or name.startswith(missing + "."))
        if is_missing and distribution == OWN_DISTRIBUTION:
            return None
        raise TableError(
            f"{name}: cannot be imported: {type(error).__name__}: {error}; install {distribution} again"
        ) from error
    return load_table(sys.modules[name])
