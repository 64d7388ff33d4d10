"""The rows that searches of configurations have given, by kernel and point, and the points around one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import key_of
from layerzero_tune.compile.pooling import pool_of
from layerzero_tune.results.measurement import Measurement

_Group = tuple[str, str, StaticKey]  # kernel id, operation, static key; one for types that share their verdicts


class Searched:
    """Grows while a run measures; rows of contests with final rounds are left out. What was found for one of the types
    that share their verdicts on the platform counts for the other too."""

    def __init__(self, rows: Iterable[Measurement] = (), platform: str = "cpu") -> None:
        self._platform = platform
        self._points: dict[_Group, dict[SelectionContext, list[Measurement]]] = {}
        self.add(rows)

    def add(self, rows: Iterable[Measurement]) -> None:
        for row in rows:
            if row.is_search:
                points = self._points.setdefault(self._group(row.kernel_id, row.context), {})
                points.setdefault(row.context, []).append(row)

    def rows(self, kernel_id: str, context: SelectionContext) -> Sequence[Measurement]:
        """The kernel's rows at the point."""
        return self._points.get(self._group(kernel_id, context), {}).get(context, ())

    def points(self, kernel_id: str) -> list[tuple[SelectionContext, Sequence[Measurement]]]:
        """All points with rows of the kernel, under all static keys."""
        groups = (points for (kernel, _, _), points in self._points.items() if kernel == kernel_id)
        return [found for points in groups for found in points.items()]

    def _group(self, kernel_id: str, context: SelectionContext) -> _Group:
        return kernel_id, *pool_of(key_of(context), self._platform)

    def around(self, kernel_id: str, context: SelectionContext) -> list[tuple[float, Sequence[Measurement]]]:
        """The kernel's rows at each other point of the static key and its twin, the nearest first, with how far it
        is, in octaves of its sizes."""
        operation = operation_named(context.operation)
        place = _place(operation.sizes(context))
        others = [
            (math.dist(place, _place(operation.sizes(other))), operation.sizes(other), rows)
            for other, rows in self._points.get(self._group(kernel_id, context), {}).items()
            if other != context
        ]
        return [(octaves, rows) for octaves, _, rows in sorted(others, key=lambda found: found[:2])]


def _place(sizes: Sequence[int]) -> tuple[float, ...]:
    return tuple(map(math.log2, sizes))
