"""The shapes over which two tables are compared, each with its weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.cell import cell_of
from layerzero_tune.diff.side import EntryKey, Side
from layerzero_tune.workload.lines import WorkloadLine


@dataclass(frozen=True)
class Shape:
    """Calls that a table cannot tell apart, and how much they count."""

    key: EntryKey
    sizes: Sizes
    weight: float = 1.0


def shapes_of_workload(lines: Iterable[WorkloadLine]) -> tuple[Shape, ...]:
    """The shapes of a workload; weights of lines that make the same shape are added."""
    weights: dict[tuple[EntryKey, Sizes], float] = {}
    for line in lines:
        found = cell_of(line.context)
        weights[found] = weights.get(found, 0.0) + line.weight
    return tuple(Shape(key, sizes, weight) for (key, sizes), weight in weights.items())


def measured_shapes(sides: Iterable[Side]) -> tuple[Shape, ...]:
    """Every shape that one of the tables rests on, each with weight 1, in order of key and sizes."""
    found: set[tuple[EntryKey, Sizes]] = set()
    for side in sides:
        for key, entry in side.entries.items():
            for bucket in entry.buckets:
                points = (bucket.evidence or {}).get("points", ())
                found.update((key, tuple(point)) for point in points)
            found.update((key, verdict.sizes) for verdict in side.verdicts.get(key, ()))
    return tuple(Shape(key, sizes) for key, sizes in sorted(found, key=repr))
