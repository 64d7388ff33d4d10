"""Contexts that a table answers, so that hits can be timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.operations import operation_named
from layerzero_runtime.tables.table import MISS, Table, TableEntry

SHAPES = 64  # of which calls are made in turn
Contexts = Sequence[SelectionContext]
_KV_HEADS = 8
_DTYPES = ("bfloat16", "float32")
# Features that a table may hold or not.
_FEATURES: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "attention": {
        "dtype": _DTYPES,
        "head_dim": (64, 128),
        "num_kv_heads": (_KV_HEADS,),
        "num_heads": (_KV_HEADS, 4 * _KV_HEADS),
        "batch_size": (1, 2, 4),
    },
    "norm": {"dtype": _DTYPES, "hidden_size": (1024, 2048, 4096, 8192)},
    "mlp": {"dtype": _DTYPES, "hidden_size": (1024, 2048, 4096, 8192)},
}


def answered(table: Table, name: str, *, guarded: bool = False) -> Contexts:
    """SHAPES contexts that the table answers, alike in all but one size: of equal static features those of which the
    table holds the most leaves. With `guarded`, only leaves whose first plan is checked on every call.

    Raises:
        LookupError: the table does not answer as many.
    """
    features = _FEATURES[name.split(".")[0]]
    most, best = (0, 0), None
    for values in product(*features.values()):
        hits = list(_hits(table, name, dict(zip(features, values, strict=True)), guarded))
        if len(hits) < SHAPES:
            continue
        evenly = [hits[number * len(hits) // SHAPES] for number in range(SHAPES)]
        leaves = max(len(hit.entry.leaves) for hit in evenly), len({hit.leaf for hit in evenly})
        if leaves > most:
            most, best = leaves, [hit.context for hit in evenly]
    if best is None:
        kind = "with a guard" if guarded else "at all"
        raise LookupError(f"{table.name} does not answer {SHAPES} calls of {name} {kind} that differ in one size")
    return best


class _Hit(NamedTuple):
    entry: TableEntry
    leaf: int
    context: SelectionContext


def _hits(table: Table, name: str, features: Mapping[str, Any], guarded: bool) -> Iterator[_Hit]:
    operation, device = operation_named(name), detect_device("cpu")
    for sizes in _sizes(name):
        context = SelectionContext(operation=name, **features, **sizes, **_extras(name)).with_device(device)
        entry, leaf = table.find(operation, context)
        if entry is None or leaf == MISS:
            continue
        first = entry.leaves[leaf][0]
        if not guarded or (first.guards and first.accepts(context)):
            yield _Hit(entry, leaf, context)


def _sizes(name: str) -> Iterator[dict[str, Any]]:
    """The size that differs: the rows, the length of a prefill, the number of keys of a decode step."""
    if name == "attention.cross":
        yield from ({"seq_len_q": 1, "seq_len_k": length} for length in range(16, 2048, 4))
    elif name.startswith("attention"):
        yield from ({"seq_len_q": length, "seq_len_k": length} for length in range(16, 1024, 4))
    else:
        yield from ({"rows": rows} for rows in range(1, 200))


def _extras(name: str) -> dict[str, Any]:
    return {"has_bias": True} if name == "norm.layer" else {}


def guarded_kernels(table: Table) -> frozenset[str]:
    """Ids of the kernels that some leaf of the table serves only after a check of the call."""
    return frozenset(
        step.kernel_id
        for by_key in table.entries.values()
        for entry in by_key.values()
        for chain in entry.leaves
        for step in chain
        if step.guards
    )
