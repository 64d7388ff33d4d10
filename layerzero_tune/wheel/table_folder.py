"""The tables that go into a wheel: read from their folders, and checked as the runtime will find them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzero_runtime.errors import TableError
from layerzero_runtime.tables.table import MISS, Table
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import EVIDENCE_FILE, MODULE_FILE
from layerzero_tune.evaluate.summary import summary_cells

EVALUATION_FILE = "evaluation.json"
PROVENANCE = ("results", "measurements", "measured_from", "measured_to", "versions")


@dataclass(frozen=True)
class ShippedEvaluation:
    """What `evaluate` found on held-out shapes: when, UTC, and its rows in the order of `SUMMARY_COLUMNS`."""

    measured_to: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class TableFolder:
    """A device's folder: its table, the files that are shipped, by name, and the evaluation, if there is one."""

    slug: str
    table: Table
    files: Mapping[str, bytes]
    evaluation: ShippedEvaluation | None


def read_tables(places: Iterable[Path]) -> tuple[TableFolder, ...]:
    """The tables of device folders, or of folders of such, in ascending order of slug.

    Raises:
        TableError: there is none, two are of one device, or one cannot be shipped, as `read_table` says.
    """
    folders = [folder for place in places for folder in _device_folders(place)]
    found: dict[str, tuple[Path, TableFolder]] = {}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        table = read_table(folder)
        if table.slug in found:
            raise TableError(f"{found[table.slug][0]} and {folder} are both tables of {table.slug}; ship one of them")
        found[table.slug] = (folder, table)
    return tuple(table for _, (_, table) in sorted(found.items()))


def _device_folders(place: Path) -> list[Path]:
    found = sorted(path.parent for path in place.glob(f"*/{MODULE_FILE}"))
    if found:
        return found
    if (place / MODULE_FILE).is_file():
        return [place]
    raise TableError(f"{place} holds no table; compile results with layerzero-tune compile RESULTS --out {place}")


def read_table(folder: Path) -> TableFolder:
    """The table of a device's folder, after the checks that it is what `compile` wrote: the module holds literals and
    decisions only, has the schema of this release, lies in its device's folder, and answers at every measured point of
    its evidence with the leaf that the point belongs to; an evaluation is one of these results.

    Raises:
        TableError: one of these does not hold, or a file is missing or cannot be read.
    """
    table = load_table_file(folder / MODULE_FILE)
    if table.device.slug != folder.name:
        raise TableError(f"{folder} holds a table of {table.device.slug}; rename the folder to that")
    provenance = table.provenance if isinstance(table.provenance, Mapping) else {}
    if missing := [name for name in PROVENANCE if name not in provenance]:
        raise TableError(f"{folder / MODULE_FILE}: PROVENANCE lacks {', '.join(missing)}; compile the results again")
    files = {name: _bytes_of(folder / name) for name in (MODULE_FILE, EVIDENCE_FILE)}
    _check_evidence(table, _json_of(folder / EVIDENCE_FILE, files[EVIDENCE_FILE]), folder / EVIDENCE_FILE)
    path = folder / EVALUATION_FILE
    if not path.exists():
        return TableFolder(folder.name, table, files, None)
    files[EVALUATION_FILE] = _bytes_of(path)
    return TableFolder(folder.name, table, files, _evaluation(table, _json_of(path, files[EVALUATION_FILE]), path))


def _evaluation(table: Table, found: Mapping[str, Any], path: Path) -> ShippedEvaluation:
    try:
        if found["provenance"] != json.loads(json.dumps(table.provenance)):
            raise TableError(f"{path} is an evaluation of other results than the table's; evaluate again, or remove it")
        rows = tuple(summary_cells(row["operation"], row["mode"], row) for row in found["summaries"])
        return ShippedEvaluation(str(found["measured_to"]), rows)
    except (LookupError, TypeError, ValueError) as error:
        raise TableError(
            f"{path} is not what evaluate --json prints ({error!r}); evaluate again, or remove it"
        ) from error


def _check_evidence(table: Table, evidence: Mapping[str, Any], path: Path) -> None:
    held = {(operation, repr(key)): entry for operation, keys in table.entries.items() for key, entry in keys.items()}
    try:
        told = {(operation, key): leaves for operation, keys in evidence.items() for key, leaves in keys.items()}
        if told.keys() != held.keys():
            raise ValueError("it has other static keys")
        for (operation, key), entry in held.items():
            leaves = told[operation, key]
            if len(leaves) != len(entry.leaves):
                raise ValueError(f"{operation} {key} has {len(leaves)} buckets, the module {len(entry.leaves)}")
            for number, leaf in enumerate(leaves):
                for point in leaf["evidence"]["points"] if leaf["evidence"] else ():
                    # Misses part a bucket: then its points lie in several leaves, which have one chain.
                    found = entry.decide(*point)
                    if found == MISS or entry.leaves[found] != entry.leaves[number]:
                        raise ValueError(f"{operation} {key} at {point} is in another bucket of the module")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TableError(f"{path} is not of the module beside it: {error}; compile the results again") from error


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}; compile the results again") from error


def _json_of(path: Path, data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise TableError(f"{path} is damaged: {error}; write it again") from error
    if not isinstance(value, dict):
        raise TableError(f"{path} is damaged: it holds no JSON object; write it again")
    return value
