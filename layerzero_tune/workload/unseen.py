"""What of a workload evaluates a tuning on another one: what was not measured, and yet lies between what was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.workload.lines import WorkloadLine


def unseen_lines(lines: Iterable[WorkloadLine], tuned: Sequence[WorkloadLine]) -> tuple[WorkloadLine, ...]:
    """The lines whose key and sizes the tuned workload does not have, though it has calls of the same operation and
    static key, and every size lies between the smallest and the largest of these. (To a table 4 x 12 heads are 3 x 16.)
    """
    sizes: dict[Any, set[tuple[int, ...]]] = {}
    for line in tuned:
        sizes.setdefault(_key(line.context), set()).add(_sizes(line.context))
    ranges = {key: [(min(axis), max(axis)) for axis in zip(*found, strict=True)] for key, found in sizes.items()}

    def is_between(context: SelectionContext) -> bool:
        key, own = _key(context), _sizes(context)
        if key not in ranges or own in sizes[key]:
            return False
        return all(low <= size <= high for size, (low, high) in zip(own, ranges[key], strict=True))

    return tuple(line for line in lines if is_between(line.context))


def _key(context: SelectionContext) -> Any:
    operation = operation_named(context.operation)
    return operation.name, operation.static_key(context)


def _sizes(context: SelectionContext) -> tuple[int, ...]:
    return operation_named(context.operation).sizes(context)
