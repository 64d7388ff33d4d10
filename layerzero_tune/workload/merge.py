"""Merging workloads: what several processes recorded as one, in an order that depends on the shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from layerzero_runtime.context import FIELD_NAMES, SelectionContext
from layerzero_tune.workload.lines import WorkloadLine


def merge_sorted(workloads: Iterable[Iterable[WorkloadLine]]) -> tuple[WorkloadLine, ...]:
    """One line for each context, with the sum of its weights, ordered by the fields of the contexts. The order of the
    workloads changes nothing.

    Raises:
        WorkloadError: a sum of weights is too large for a float.
    """
    weights: dict[SelectionContext, list[float]] = {}
    for workload in workloads:
        for line in workload:
            weights.setdefault(line.context, []).append(line.weight)
    return tuple(WorkloadLine(context, _sum(weights[context])) for context in sorted(weights, key=_order))


def _order(context: SelectionContext) -> tuple[Any, ...]:
    """The fields in the order of their declaration; one that is not given goes first."""
    values = (getattr(context, name) for name in FIELD_NAMES)
    return tuple((value is not None, value) for value in values)


def _sum(weights: list[float]) -> float:
    """The exact sum, rounded once, whatever the order."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf
