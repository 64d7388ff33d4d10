"""Fewer lines of a workload, for what has not the time to measure all."""

from __future__ import annotations

import random
from collections.abc import Sequence

from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine


def sample_lines(lines: Sequence[WorkloadLine], at_most: int, seed: int) -> tuple[WorkloadLine, ...]:
    """At most so many lines of each operation and mode, each as likely as any other, in their order. Equal input and
    seed give equal lines; a larger sample has those of a smaller one.

    Raises:
        WorkloadError: `at_most` is below 1.
    """
    if at_most < 1:
        raise WorkloadError(f"a sample of {at_most} lines per operation and mode is empty, required at least 1")
    groups: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        groups.setdefault((line.context.operation, line.context.mode), []).append(number)
    chance = random.Random(seed)
    kept = [number for _, group in sorted(groups.items()) for number in chance.sample(group, len(group))[:at_most]]
    return tuple(lines[number] for number in sorted(kept))
