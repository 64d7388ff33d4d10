"""A workload in summary: which tables it asks for, and over which ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_tune.workload.lines import WorkloadLine


@dataclass(frozen=True)
class WorkloadSummary:
    """The lines of one operation with equal static features.

    Attributes:
        features: (name, value) of the static features that the operation keys on, and of those with an unusual value.
        lines: how many lines there are.
        weight: the sum of their weights.
        ranges: (axis, smallest, largest) of each free axis.
    """

    operation: str
    mode: str
    dtype: str
    features: tuple[tuple[str, Any], ...]
    lines: int
    weight: float
    ranges: tuple[tuple[str, int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "operation": self.operation,
            "mode": self.mode,
            "dtype": self.dtype,
            "features": dict(self.features),
            "lines": self.lines,
            "weight": self.weight,
            "ranges": {axis: [low, high] for axis, low, high in self.ranges},
        }


def describe_workload(lines: Iterable[WorkloadLine]) -> tuple[WorkloadSummary, ...]:
    """One summary for each operation and static key, in the order of their first occurrence."""
    groups: dict[tuple[str, Any], list[WorkloadLine]] = {}
    for line in lines:
        operation = operation_named(line.context.operation)
        groups.setdefault((operation.name, operation.static_key(line.context)), []).append(line)
    return tuple(_summary(operation_named(name), static_key, group) for (name, static_key), group in groups.items())


def _summary(operation: Operation, static_key: tuple[Any, ...], lines: list[WorkloadLine]) -> WorkloadSummary:
    mode, dtype, *static, unusual = static_key
    contexts = [line.context for line in lines]
    axes = [axis.name for axis in operation.axes_of(contexts[0])]
    values = [[getattr(context, axis) for context in contexts] for axis in axes]
    return WorkloadSummary(
        operation=operation.name,
        mode=mode,
        dtype=dtype,
        features=(*zip(operation.static, static, strict=True), *unusual),
        lines=len(lines),
        weight=sum(line.weight for line in lines),
        ranges=tuple((axis, min(sizes), max(sizes)) for axis, sizes in zip(axes, values, strict=True)),
    )
