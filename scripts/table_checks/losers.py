"""Kernels that win nowhere, and libraries that could not be run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.command_line.output import shape_text
from layerzero_tune.compile.judge import judge
from layerzero_tune.results.measurement import Measurement
from table_checks.condition import Condition


@dataclass(frozen=True)
class Nearest:
    """Where a kernel came nearest to the best one: its time over the best's, 1 where it won."""

    ratio: float
    context: SelectionContext


def loser_conditions(rows: Sequence[Measurement], not_run: Mapping[str, str]) -> Iterator[Condition]:
    """Print each kernel that wins nowhere with the nearest it came; every kernel for GPUs of the measured operations
    must have a time, or its library must be in `not_run`, with what was tried."""
    nearest = nearest_of(rows)
    for kernel_id, found in sorted(nearest.items()):
        if found.ratio > 1:
            shape = f"{found.context.operation} {found.context.mode} {found.context.dtype} {shape_text(found.context)}"
            print(f"  wins nowhere: {kernel_id}, nearest {found.ratio:.3f} times the best's time ({shape})")
    for library, tried in not_run.items():
        print(f"  not run: {library}: {tried}")
    operations = {row.context.operation for row in rows}
    for kernel in builtin_kernels():
        spec = kernel.spec
        if "cuda" in spec.platforms and operations & set(spec.operations) and spec.kernel_id not in nearest:
            yield Condition(f"{spec.kernel_id} has no time; {spec.library} is listed", spec.library in not_run)


def nearest_of(rows: Sequence[Measurement]) -> Mapping[str, Nearest]:
    """By kernel, of those with a time."""
    nearest: dict[str, Nearest] = {}
    for verdicts in judge(rows).values():
        for verdict in verdicts:
            best = min(standing.log_ratio for standing in verdict.standings.values())
            for (kernel_id, _), standing in verdict.standings.items():
                ratio = math.exp(standing.log_ratio - best)
                if kernel_id not in nearest or ratio < nearest[kernel_id].ratio:
                    nearest[kernel_id] = Nearest(ratio, verdict.context)
    return nearest
