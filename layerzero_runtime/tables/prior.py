"""What the nearest measurements say of a call that no table entry answers: a guess, for the live selector alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, StaticKey
from layerzero_runtime.tables.table import Table
from layerzero_runtime.tables.table_evidence import evidence_of
from layerzero_runtime.twin_types import twin_of

# A bucket says nothing of sizes further away than this factor on any axis: as wide as the steps between the measured
# points of a tuning are at most.
REACH = 16.0
MAX_KEPT = 4096
# Static features that are sizes: what was measured at one value says something of the values around it.
_NUMERIC = ("head_dim", "gqa_group")
# Octaves beside a call that a bucket of the other type is worth; those of other numeric features count as they are.
TWIN_GAP = 0.25

Preference = tuple[str, Mapping[str, Any]]  # kernel id, configuration


@dataclass(frozen=True, slots=True)
class Prior:
    """Kernels in the order in which the nearest bucket prefers them, and a name for that bucket; both may be empty."""

    preferences: tuple[Preference, ...] = ()
    bucket: str = ""


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
        preferences: list[Preference] = [(step.kernel_id, step.configuration) for step in entry.leaves[leaf]]
        evidence = evidence_of(self._table, operation.name, static_key, leaf).get("evidence") or {}
        runner_up = evidence.get("runner_up")
        if runner_up is not None and all(kernel_id != runner_up for kernel_id, _ in preferences):
            preferences.append((runner_up, {}))
        return Prior(tuple(preferences), f"{operation.name} {static_key} leaf {leaf}")

    def _search(self, operation: Operation, context: SelectionContext) -> Prior:
        # The lower end of each octave stands for all sizes in it.
        lows = [1 << (size.bit_length() - 1) for size in operation.sizes(context)]
        sizes = {axis.name: low for axis, low in zip(operation.axes, lows, strict=True)}
        best: tuple[float, StaticKey, int] | None = None
        for key_gap, static_key in self._nearest_keys(operation, context):
            if best is not None and key_gap >= best[0]:
                break
            found = self._nearest_leaf(operation, static_key, sizes)
            if found is not None and (best is None or key_gap + found[0] < best[0]):
                best = (key_gap + found[0], static_key, found[1])
        return Prior() if best is None else self.of_leaf(operation, *best[1:])

    def _nearest_leaf(
        self, operation: Operation, static_key: StaticKey, sizes: Mapping[str, int]
    ) -> tuple[float, int] | None:
        """Octaves between the sizes and the key's nearest bucket with a plan, and its number."""
        best: tuple[float, int] | None = None
        for leaf, chain in enumerate(self._table.entries[operation.name][static_key].leaves):
            bucket = evidence_of(self._table, operation.name, static_key, leaf).get("bucket")
            if not bucket or not chain:
                continue
            gaps = {
                name: _gap(name, bounds, sizes)
                for name, bounds in bucket.items()
                if sizes.keys() >= set(name.split(" * "))
            }
            is_near = all(gap <= math.log2(REACH) for name, gap in gaps.items() if name in sizes)
            if is_near and (best is None or (sum(gaps.values()), leaf) < best):
                best = (sum(gaps.values()), leaf)
        return best

    def _nearest_keys(self, operation: Operation, context: SelectionContext) -> list[tuple[float, StaticKey]]:
        """The measured static keys that differ from the context's in numeric features, or on a GPU by the other 16-bit
        type, each with the octaves that this is worth, nearest first."""
        own = operation.static_key(context)
        numeric = [2 + place for place, name in enumerate(operation.static) if name in _NUMERIC]
        wanted = {_without(own, numeric): 0.0}
        twin = twin_of(own, self._table.device.platform)
        if twin is not None:
            wanted[_without(twin, numeric)] = TWIN_GAP
        found = []
        for key in self._table.entries.get(operation.name, {}):
            gap = wanted.get(_without(key, numeric))
            if gap is not None:
                steps = [abs(math.log2(key[place] / own[place])) for place in numeric]
                if sum(steps) <= math.log2(REACH):
                    found.append((gap + sum(steps), key))
        return sorted(found, key=lambda each: (each[0], repr(each[1])))


def _without(key: StaticKey, places: Sequence[int]) -> StaticKey:
    return tuple(value for place, value in enumerate(key) if place not in places)


def _gap(name: str, bounds: Sequence[int], sizes: Mapping[str, int]) -> float:
    """Octaves by which a size, or the product of several ("rows * hidden_size"), lies outside a bucket's range.

    A balance of waves is not asked for: beside a bucket there are calls on either side of it.
    """
    size = math.prod(sizes[axis] for axis in name.split(" * "))
    return max(0.0, math.log2(bounds[0] / size), math.log2(size / bounds[1]))
