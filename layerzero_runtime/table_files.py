"""Finding the tables of a device: a folder named by LAYERZERO_TABLES first, then the installed ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.table import Table, load_table

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
        from layerzero_runtime.table_syntax import check_table_source

        check_table_source(source, str(path))
        _checked.add(digest)
    module = ModuleType(path.parent.name)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (NameError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a generated table: {error}; compile the results again") from error
    return load_table(module)


def find_table(device: DeviceSpec) -> tuple[Table | None, tuple[TableError, ...]]:
    """The first table that matches the device exactly, and the errors of tables that had to be skipped."""
    skipped: list[TableError] = []
    folder = os.environ.get(TABLES_VARIABLE)
    if folder:
        path = Path(folder) / device.slug / "__init__.py"
        if path.is_file():
            try:
                table = load_table_file(path)
            except TableError as error:
                skipped.append(error)
            else:
                if table.device.matches(device) == "exact":
                    return table, tuple(skipped)
                skipped.append(TableError(f"{path}: compiled for {table.device.slug}, this device is {device.slug}"))
    module = _import_installed(device.slug)
    if module is not None:
        try:
            table = load_table(module)
        except TableError as error:
            skipped.append(error)
        else:
            if table.device.matches(device) == "exact":
                return table, tuple(skipped)
    return None, tuple(skipped)


def _import_installed(slug: str) -> ModuleType | None:
    name = f"{INSTALLED_PACKAGE}.{slug}"
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise
    return sys.modules[name]
