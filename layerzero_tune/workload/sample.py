"""Fewer lines of a workload, for what has not the time to measure all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from layerzero_tune.identity import canonical_json
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine


def sample_lines(lines: Sequence[WorkloadLine], at_most: int, seed: int) -> tuple[WorkloadLine, ...]:
    """At most so many lines of each operation and mode, each as likely as any other, in their order. Equal input and
    seed give equal lines; a larger sample has those of a smaller one. A line's context decides its turn, so that lines
    which come or go move no others but those at the end.

    Raises:
        WorkloadError: `at_most` is below 1.
    """
    if at_most < 1:
        raise WorkloadError(f"a sample of {at_most} lines per operation and mode is empty, required at least 1")
    groups: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        groups.setdefault((line.context.operation, line.context.mode), []).append(number)
    turns = [_turn(line, seed) for line in lines]
    kept = [number for group in groups.values() for number in sorted(group, key=turns.__getitem__)[:at_most]]
    return tuple(lines[number] for number in sorted(kept))


def _turn(line: WorkloadLine, seed: int) -> str:
    return hashlib.sha256(f"{seed} {canonical_json(line.context.to_dict())}".encode()).hexdigest()
