"""The evidence beside a table: read when something asks for it, never for a hit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from layerzero_runtime.errors import TableError
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.tables.table import Table

EVIDENCE_FILE = "evidence.json"


def evidence_of(table: Table, operation: str, static_key: StaticKey, leaf: int) -> Mapping[str, Any]:
    """What the file beside the table says of a leaf: its "bucket" and its "evidence"; empty without the file.

    Raises:
        TableError: the file is damaged, or not of this table.
    """
    if table.path is None:
        return {}
    import os

    path = os.path.join(os.path.dirname(table.path), EVIDENCE_FILE)
    try:
        found: Mapping[str, Any] = _read(path, os.stat(path).st_mtime_ns)[operation][repr(static_key)][leaf]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TableError(
            f"{path}: is damaged or not of this table ({type(error).__name__}: {error}); compile the results again"
        ) from error
    return found


@lru_cache(maxsize=8)
def _read(path: str, modified_ns: int) -> Mapping[str, Any]:
    import json

    with open(path, encoding="utf-8") as file:
        found: Mapping[str, Any] = json.load(file)
    return found
