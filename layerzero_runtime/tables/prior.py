"""What the nearest measurements say of a call that no table entry answers: a guess, for the live selector alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, StaticKey
from layerzero_runtime.tables.table import Table, TableEntry
from layerzero_runtime.tables.table_evidence import evidence_of

# A bucket says nothing of sizes further away than this factor on any axis: as wide as the steps between the measured
# points of a tuning are at most.
REACH = 16.0
MAX_KEPT = 4096
# Static features that are sizes: where one was not measured, the nearest stands in for it.
_NUMERIC = ("head_dim", "gqa_group")

Preference = tuple[str, Mapping[str, Any]]  # kernel id, configuration


@dataclass(frozen=True, slots=True)
class Prior:
    """Kernels in the order in which the nearest bucket prefers them, and a name for that bucket; both may be empty.

    `shares_code` tells that the bucket is of the call's own static key on its device: what its calls have compiled,
    this one runs too.
    """

    preferences: tuple[Preference, ...] = ()
    bucket: str = ""
    shares_code: bool = False


class NearestBuckets:
    """The nearest bucket of a table for calls that it misses.

    Distances are those of the octaves in which sizes lie, so that the answer is the same for all calls of one class.
    """

    __slots__ = ("_found", "_table")

    def __init__(self, table: Table) -> None:
        self._table = table
        self._found: dict[Hashable, Prior] = {}

    @staticmethod
    def class_of(operation: Operation, context: SelectionContext) -> Hashable:
        """What of a context decides its nearest bucket."""
        return operation.static_key(context), tuple(size.bit_length() for size in operation.sizes(context))

    def prior(self, operation: Operation, context: SelectionContext) -> Prior:
        """The preferences of the nearest bucket.

        Raises:
            TableError: the evidence beside the table is damaged.
        """
        key = (operation.name, self.class_of(operation, context))
        found = self._found.get(key)
        if found is None:
            found = self._search(operation, context)
            if len(self._found) < MAX_KEPT:
                self._found[key] = found
        return found

    def of_leaf(self, operation: Operation, static_key: StaticKey, leaf: int) -> Prior:
        """The preferences of one bucket: its chain, then the runner-up that its evidence names."""
        entry = self._table.entries[operation.name][static_key]
        return self._of(operation, static_key, entry, leaf, shares_code=True)

    def _of(
        self, operation: Operation, static_key: StaticKey, entry: TableEntry, leaf: int, *, shares_code: bool
    ) -> Prior:
        preferences: list[Preference] = [(step.kernel_id, step.configuration) for step in entry.leaves[leaf]]
        evidence = evidence_of(self._table, operation.name, static_key, leaf).get("evidence") or {}
        runner_up = evidence.get("runner_up")
        if runner_up is not None and all(kernel_id != runner_up for kernel_id, _ in preferences):
            preferences.append((runner_up, {}))
        return Prior(tuple(preferences), f"{operation.name} {static_key} leaf {leaf}", shares_code)

    def _search(self, operation: Operation, context: SelectionContext) -> Prior:
        static_key = self._nearest_key(operation, context)
        if static_key is None:
            return Prior()
        entry = self._table.entries[operation.name][static_key]
        # The lower end of each octave stands for all sizes in it.
        lows = [1 << (size.bit_length() - 1) for size in operation.sizes(context)]
        sizes = {axis.name: low for axis, low in zip(operation.axes, lows, strict=True)}
        best: tuple[float, int] | None = None
        for leaf in range(len(entry.leaves)):
            bucket = evidence_of(self._table, operation.name, static_key, leaf).get("bucket")
            if not bucket or not entry.leaves[leaf]:
                continue
            gaps = {
                name: _gap(name, bounds, sizes)
                for name, bounds in bucket.items()
                if sizes.keys() >= set(name.split(" * "))
            }
            is_near = all(gap <= math.log2(REACH) for name, gap in gaps.items() if name in sizes)
            if is_near and (best is None or (sum(gaps.values()), leaf) < best):
                best = (sum(gaps.values()), leaf)
        if best is None:
            return Prior()
        shares_code = static_key == operation.static_key(context)
        return self._of(operation, static_key, entry, best[1], shares_code=shares_code)

    def _nearest_key(self, operation: Operation, context: SelectionContext) -> StaticKey | None:
        """The measured static key that differs in numeric features alone, by the least sum of log ratios."""
        wanted = operation.static_key(context)
        keys = self._table.entries.get(operation.name, {})
        if wanted in keys:
            return wanted
        numeric = [2 + place for place, name in enumerate(operation.static) if name in _NUMERIC]
        best: tuple[float, str, StaticKey] | None = None
        for key in keys:
            if any(a != b for place, (a, b) in enumerate(zip(key, wanted, strict=True)) if place not in numeric):
                continue
            gap = sum(abs(math.log2(key[place] / wanted[place])) for place in numeric)
            if gap <= math.log2(REACH) and (best is None or (gap, repr(key)) < best[:2]):
                best = (gap, repr(key), key)
        return None if best is None else best[2]


def _gap(name: str, bounds: Sequence[int], sizes: Mapping[str, int]) -> float:
    """Octaves by which a size, or the product of several ("rows * hidden_size"), lies outside a bucket's range."""
    size = math.prod(sizes[axis] for axis in name.split(" * "))
    return max(0.0, math.log2(bounds[0] / size), math.log2(size / bounds[1]))
