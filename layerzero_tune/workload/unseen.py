"""What of a workload evaluates a tuning on another one: what was not measured, and yet lies between what was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.workload.lines import WorkloadLine


def unseen_lines(lines: Iterable[WorkloadLine], tuned: Sequence[WorkloadLine]) -> tuple[WorkloadLine, ...]:
    """The lines whose call the tuned workload does not have, though it has calls of the same operation and static key,
    and every size lies between the smallest and the largest of these."""
    seen = {line.context for line in tuned}
    sizes: dict[Any, list[tuple[int, ...]]] = {}
    for context in seen:
        sizes.setdefault(_key(context), []).append(_sizes(context))
    ranges = {key: [(min(axis), max(axis)) for axis in zip(*found, strict=True)] for key, found in sizes.items()}

    def is_between(context: SelectionContext) -> bool:
        found = ranges.get(_key(context))
        return found is not None and all(
            low <= size <= high for size, (low, high) in zip(_sizes(context), found, strict=True)
        )

    return tuple(line for line in lines if line.context not in seen and is_between(line.context))


def _key(context: SelectionContext) -> Any:
    operation = operation_named(context.operation)
    return operation.name, operation.static_key(context)


def _sizes(context: SelectionContext) -> tuple[int, ...]:
    return operation_named(context.operation).sizes(context)
