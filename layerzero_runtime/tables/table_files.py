"""Finding the tables of a device: a folder named by LAYERZERO_TABLES first, then the installed ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.tables.table import Table, load_table

TABLES_VARIABLE = "LAYERZERO_TABLES"
INSTALLED_PACKAGE = "layerzero_tables"

# Sources that passed the syntax check, by content hash.
_checked: set[bytes] = set()


def load_table_file(path: Path) -> Table:
    """Load a table given by path: its source is checked before it runs, once per content.

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
        _checked.add(digest)
    module = ModuleType(path.parent.name)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (NameError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a generated table: {error}; compile the results again") from error
    return load_table(module)


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
    """The first table that matches the device exactly, and the errors of tables that had to be skipped."""
    skipped: list[TableError] = []
    for load in (_load_named, _load_installed):
        try:
            table = load(device.slug)
            if table is None:
                continue
            check_device(table, device)
            return table, tuple(skipped)
        except TableError as error:
            skipped.append(error)
    return None, tuple(skipped)


def find_alike(device: DeviceSpec) -> tuple[Table, ...]:
    """The tables of approximately matching devices, the most alike first; those that cannot be used are left out."""
    found: dict[str, Table] = {}
    for slug, load in (
        *((slug, _load_named) for slug in _named_slugs()),
        *((s, _load_installed) for s in _installed_slugs()),
    ):
        try:
            table = load(slug)
        except TableError:
            continue  # reported where it is the table of the device in use
        if table is not None and table.device.matches(device) == "approximate":
            found.setdefault(slug, table)
    return tuple(sorted(found.values(), key=lambda table: (device.distance(table.device), table.device.slug)))


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


def _load_named(slug: str) -> Table | None:
    """The device's table in the folder that the environment names, None without one."""
    folder = os.environ.get(TABLES_VARIABLE)
    if not folder:
        return None
    if not os.path.isdir(folder):
        raise TableError(f"{TABLES_VARIABLE} is {folder!r}, which is not a folder; name one that holds tables")
    path = Path(folder, slug, "__init__.py")
    return load_table_file(path) if os.path.isfile(path) else None


def _load_installed(slug: str) -> Table | None:
    """The device's table among the installed ones, None without one."""
    name = f"{INSTALLED_PACKAGE}.{slug}"
    try:
        __import__(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(missing + ".")):
            return None
        raise TableError(f"{name}: cannot be imported: {type(error).__name__}: {error}; install it again") from error
    return load_table(sys.modules[name])
