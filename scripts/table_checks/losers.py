"""Kernels that win nowhere, and libraries that could not be run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.command_line.output import shape_text
from layerzero_tune.compile.judge import judge
from layerzero_tune.compile.pipeline import current_rows
from layerzero_tune.results.measurement import Measurement
from table_checks.condition import Condition


@dataclass(frozen=True)
class Nearest:
    """Where a kernel came nearest to the best one.

    Attributes:
        has_won: it was the best itself, at one shape at least.
        ratio: its time over the best's.
        has_rounds: whether it is a ratio of final rounds, or of a screening, which it left nowhere.
    """

    has_won: bool
    ratio: float
    has_rounds: bool
    context: SelectionContext

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The nearest is the least."""
        return not self.has_won, not self.has_rounds, self.ratio


def loser_conditions(rows: Sequence[Measurement], not_run: Mapping[str, str]) -> Iterator[Condition]:
    """Print each kernel that wins nowhere with the nearest it came; every kernel for GPUs of the measured operations
    must have a time, or its library must be in `not_run`, with what was tried."""
    nearest = nearest_of(rows)
    for kernel_id, found in sorted(nearest.items()):
        if not found.has_won:
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
    """By kernel, of those with a time; rows of the newest source of each alone, as a table is compiled from them."""
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    nearest: dict[str, Nearest] = {}
    for verdicts in judge(current_rows(rows, kernels)).values():
        for verdict in verdicts:
            best = verdict.standings[verdict.best].log_ratio
            for choice, standing in verdict.standings.items():
                ratio = math.exp(standing.log_ratio - best)
                found = Nearest(choice == verdict.best, ratio, bool(standing.rounds), verdict.context)
                held = nearest.get(choice[0])
                if held is None or found.rank < held.rank:
                    nearest[choice[0]] = found
    return nearest
