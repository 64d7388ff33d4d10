"""Reading what `diff` compares: results, the table of a device, or a folder with the tables of several."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from layerzero_runtime.errors import ContextError, ResultsError, TableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.operations import operation_named
from layerzero_runtime.tables.table import MISS, Table, TableEntry
from layerzero_runtime.tables.table_evidence import EVIDENCE_FILE, evidence_of
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, emit
from layerzero_tune.compile.form import Step
from layerzero_tune.compile.judge import Verdict, judge
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.diff.ranges import axes_of, sizes_inside
from layerzero_tune.diff.side import Bucket, EntryKey, Side, SideEntry
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.content import results_hash
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore

RESULTS_FOLDER = "results"


@dataclass(frozen=True)
class Pairs:
    """Which tables are compared, and which have no counterpart on the other side."""

    compared: tuple[tuple[Side, Side], ...]
    removed: tuple[Side, ...]
    added: tuple[Side, ...]


def paired(old: Sequence[Side], new: Sequence[Side]) -> Pairs:
    """The tables of both sides by device; where there is one on either side, these two, whatever their devices."""
    if len(old) == len(new) == 1:
        return Pairs(((old[0], new[0]),), (), ())
    pairs = tuple((a, b) for a in old for b in new if a.device.matches(b.device) == "exact")
    return Pairs(
        pairs,
        removed=tuple(side for side in old if all(side is not a for a, _ in pairs)),
        added=tuple(side for side in new if all(side is not b for _, b in pairs)),
    )


def read_sides(path: Path, kernels: Mapping[str, Kernel]) -> tuple[Side, ...]:
    """The tables at `path`, one for each device, in order of their folders' names. Results are compiled first;
    `kernels` are those that may occur in them.

    Raises:
        ResultsError: there is neither a table nor results, or the results cannot be read or compiled.
        TableError: a table is damaged, of another schema, or the evidence beside it is missing or of another one.
    """
    folders = sorted(module.parent for module in path.glob(f"*/{MODULE_FILE}"))
    if folders:
        return tuple(_table_side(folder) for folder in folders)
    if (path / MODULE_FILE).is_file():
        return (_table_side(path),)
    if any(path.glob("*.parquet")):
        return (_results_side(path, kernels),)
    raise ResultsError(
        f"{path} holds nothing to compare; name a folder of results (*.parquet), the folder of a device's table "
        f"({MODULE_FILE} and {EVIDENCE_FILE}), or a folder of such folders"
    )


def _table_side(folder: Path) -> Side:
    table = load_table_file(folder / MODULE_FILE)
    rows = _rows_beside(folder, table)
    return _side(folder, table, rows, judge(rows))


def _results_side(folder: Path, kernels: Mapping[str, Kernel]) -> Side:
    rows = ResultsStore(folder).read().rows
    compiled = compile_rows(rows, kernels.values())
    with TemporaryDirectory() as draft:
        table = load_table_file(emit(compiled.form).write(Path(draft)) / MODULE_FILE)
        return _side(folder, table, rows, compiled.verdicts)


def _rows_beside(folder: Path, table: Table) -> Sequence[Measurement]:
    """The results beside a table, if they are those that it was compiled from."""
    if not any((folder / RESULTS_FOLDER).glob("*.parquet")):
        return ()
    rows = ResultsStore(folder / RESULTS_FOLDER).read().rows
    return rows if results_hash(rows) == table.provenance.get("results") else ()


def _side(
    path: Path, table: Table, rows: Sequence[Measurement], verdicts: Mapping[EntryKey, tuple[Verdict, ...]]
) -> Side:
    assert table.path is not None
    products = _largest_products(Path(table.path))
    return Side(
        path=path,
        device=table.device,
        provenance=table.provenance,
        kernels=table.kernels,
        sources={kernel_id: kernel["source"] for kernel_id, kernel in table.kernels.items()}
        | {row.kernel_id: row.source_hash for row in sorted(rows, key=lambda row: row.measured_at)},
        entries={
            (operation, static_key): _entry(table, operation, static_key, entry, products.get(entry.decide.__name__))
            for operation, by_key in table.entries.items()
            for static_key, entry in by_key.items()
        },
        verdicts=verdicts,
        contests=len({row.contest_id for row in rows}),
        disturbed=len({row.contest_id for row in rows if row.is_contended}),
    )


def _entry(table: Table, name: str, static_key: StaticKey, entry: TableEntry, max_product: int | None) -> SideEntry:
    place = f"{table.path}: {name} {static_key}"
    try:
        operation = operation_named(name)
    except ContextError as error:
        raise TableError(f"{place}: {error}; compare it with the release that compiled it") from error
    axes = [axis.name for axis in operation.axes]
    buckets = []
    for leaf, chain in enumerate(entry.leaves):
        found = evidence_of(table, name, static_key, leaf)
        ranges = found.get("bucket")
        if not ranges or any(axis not in axes for name in ranges for axis in axes_of(name)):
            raise TableError(
                f"{place}: {EVIDENCE_FILE} beside it does not say which sizes bucket {leaf} serves; compile the "
                "results again"
            )
        ordered = {name: (low, high) for name, (low, high) in ranges.items()}
        steps = tuple(Step((step.kernel_id, canonical_json(dict(step.configuration))), step.guards) for step in chain)
        buckets.append(Bucket(ordered, steps, found.get("evidence")))
    side_entry = SideEntry(operation, static_key, entry.decide, tuple(buckets), max_product)
    for leaf, bucket in enumerate(buckets):
        sizes = sizes_inside(bucket.ranges)
        answer = leaf if sizes is None else entry.decide(*side_entry.sizes(sizes))
        if answer not in (leaf, MISS):
            raise TableError(
                f"{place}: {EVIDENCE_FILE} is of another table: the module answers {answer} in the middle of bucket "
                f"{leaf}; compile the results again"
            )
    return side_entry


def _largest_products(module: Path) -> dict[str, int]:
    """By decision function the largest product of sizes that it serves; functions without such a bound are left out."""
    functions = [node for node in ast.parse(module.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {function.name: bound for function in functions for bound in _product_bounds(function)}


def _product_bounds(function: ast.FunctionDef) -> Iterator[int]:
    for node in ast.walk(function.body[0]):  # what comes before the decisions
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.BinOp) and isinstance(node.ops[0], ast.LtE):
            bound = node.comparators[0]
            if isinstance(bound, ast.Constant) and isinstance(bound.value, int):
                yield bound.value
