"""Staleness: whether the kernels of a table are still those that were measured, and which entries do not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from layerzero_runtime.errors import TableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import library_version
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.registry import Registry
from layerzero_runtime.tables.table import Table, TableEntry, TableStep

# Kernels that a message names for one reason.
MAX_NAMED = 3

# What an adapter's file calls to declare its kernels.
_DECLARATIONS = ("Kernel", "KernelSpec", "ConfigurationSpace")


def version_that_matters(kernel: Kernel) -> str:
    """The leading digits of the library's version that the adapter declares to matter; "" if it is not installed."""
    version = library_version(kernel.spec.library)
    return "" if version is None else ".".join(version.split("+")[0].split(".")[: kernel.spec.version_digits])


def kernel_source_hash(kernel: Kernel) -> str:
    """A hash over the code of the kernel's adapter and its further `sources`, 32 hexadecimal digits; "" where no source
    is at hand.

    What the adapter's file declares (specs and the list of its kernels), imports, comments between statements and its
    docstring are left out: none of these changes how long a call takes. A limit that has changed is not stale: it is
    checked again whenever a snapshot is built.
    """
    if not hasattr(kernel.load, "__code__"):
        return ""
    adapter = kernel.load.__code__.co_filename
    return _joined_hash(adapter, kernel.sources) if kernel.sources else _code_hash(adapter)


@cache
def _joined_hash(adapter: str, sources: tuple[str, ...]) -> str:
    import hashlib
    import os

    folder = os.path.dirname(adapter)
    hashes = [_code_hash(path) for path in (adapter, *(os.path.join(folder, source) for source in sources))]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]


@cache
def _code_hash(path: str) -> str:
    import hashlib

    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except OSError:
        return ""
    return hashlib.sha256(_timed_code(source).encode()).hexdigest()[:32]


def _timed_code(source: str) -> str:
    """The statements of a module that decide how long its functions take."""
    import ast
    import re

    # To walk through all nodes of every function takes longer than all else here, and most name no declaration.
    declaration = re.compile(rf"\b(?:{'|'.join(_DECLARATIONS)})\b")
    lines = source.splitlines()
    kept: list[str] = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        decorators = getattr(statement, "decorator_list", ())
        first = min((statement.lineno, *(decorator.lineno for decorator in decorators)))
        text = "\n".join(lines[first - 1 : statement.end_lineno])
        if declaration.search(text):
            calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
            if any(isinstance(function, ast.Name) and function.id in _DECLARATIONS for function in calls):
                continue
        kept.append(text)
    return "\n".join(kept)


@dataclass(frozen=True, slots=True)
class StaleEntry:
    """A bucket whose plan no longer holds, and why; `leaf` is its number under the static key."""

    operation: str
    static_key: StaticKey
    leaf: int
    kernel_id: str
    reason: str


def stale_reason(table: Table, kernel_id: str, kernel: Kernel | None) -> str | None:
    """Why a table's entries of a kernel no longer hold, None if they do; `kernel` is what is registered under its id.

    A kernel whose library is not installed is not stale but unavailable, which its plan says.
    """
    if kernel is None:
        return "not registered"
    measured = table.kernels.get(kernel_id)
    if measured is None:
        return "not described by the table"
    version = version_that_matters(kernel)
    if version and measured["version"] != version:
        return f"measured with {kernel.spec.library} {measured['version']}, installed is {version}"
    if measured["source"] != kernel_source_hash(kernel):
        return "code has changed since it was measured"
    return None


def stale_reasons(table: Table, registry: Registry) -> dict[str, str]:
    """Why, by kernel, for all kernels of a table whose entries no longer hold."""
    found = ((kernel_id, stale_reason(table, kernel_id, registry.get(kernel_id))) for kernel_id in table.kernels)
    return {kernel_id: reason for kernel_id, reason in found if reason is not None}


def stale_entries(table: Table, reasons: Mapping[str, str]) -> tuple[StaleEntry, ...]:
    """The entries whose plan is one of these kernels, for these reasons; what stands behind a plan does not count."""
    return tuple(
        StaleEntry(operation, static_key, leaf, chain[0].kernel_id, reasons[chain[0].kernel_id])
        for operation, by_key in table.entries.items()
        for static_key, entry in by_key.items()
        for leaf, chain in enumerate(_chains(entry))
        if chain and chain[0].kernel_id in reasons
    )


def stale_message(table: Table, reasons: Mapping[str, str]) -> str:
    """One line: how many entries of a table are stale, why, and what to run."""
    stale = stale_entries(table, reasons)
    number = sum(
        bool(chain) for by_key in table.entries.values() for entry in by_key.values() for chain in _chains(entry)
    )
    by_reason: dict[str, list[str]] = {}
    for kernel_id, reason in reasons.items():
        by_reason.setdefault(reason, []).append(kernel_id)
    why = "; ".join(f"{reason} ({_shortened(kernel_ids)})" for reason, kernel_ids in by_reason.items())
    device = "--device cpu " if table.device.platform == "cpu" else ""
    operations = sorted({entry.operation for entry in stale})
    ops = f"--ops {','.join(operations)} " if operations != sorted(table.entries) else ""
    return (
        f"{len(stale)} of {number} entries of {table.name} are stale, the next plan or the live selector serves in "
        f"their place: {why}. To renew them, with the table's results in RESULTS: layerzero-tune run {device}{ops}"
        "--out RESULTS && layerzero-tune compile RESULTS --out TABLES"
    )


def _chains(entry: TableEntry) -> tuple[tuple[TableStep, ...], ...]:
    """The chains of an entry; none where it is damaged, which is reported when a call needs it."""
    try:
        return entry.leaves
    except TableError:
        return ()


def _shortened(kernel_ids: Sequence[str]) -> str:
    named = ", ".join(kernel_ids[:MAX_NAMED])
    return named if len(kernel_ids) <= MAX_NAMED else f"{named} and {len(kernel_ids) - MAX_NAMED} more"
