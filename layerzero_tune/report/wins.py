"""Where each kernel wins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from layerzero_tune.compile.judge import judge
from layerzero_tune.results.measurement import Measurement


@dataclass(frozen=True)
class KernelWins:
    """How a kernel fares in one operation and dtype.

    Attributes:
        points: cells (static key and sizes) at which it has a time.
        wins: cells at which it is the best choice; a tie that holds the default is the default's.
        largest_gain: the default's time over this kernel's where that is largest among its wins; None without a win, or
            where the default has no time at any.
    """

    operation: str
    dtype: str
    kernel_id: str
    points: int
    wins: int
    largest_gain: float | None


def kernel_wins(rows: Iterable[Measurement]) -> tuple[KernelWins, ...]:
    """One line per operation, dtype and kernel, in that order."""
    points: dict[tuple[str, str, str], int] = {}
    wins: dict[tuple[str, str, str], int] = {}
    gains: dict[tuple[str, str, str], list[float]] = {}
    for (operation, static_key), verdicts in judge(rows).items():
        dtype = str(static_key[1])
        for verdict in verdicts:
            for kernel_id in {kernel_id for kernel_id, _ in verdict.standings}:
                points[operation, dtype, kernel_id] = points.get((operation, dtype, kernel_id), 0) + 1
            winner = verdict.default if verdict.default in verdict.tied else verdict.best
            key = (operation, dtype, winner[0])
            wins[key] = wins.get(key, 0) + 1
            default = verdict.standings.get(verdict.default)
            if default is not None:
                gains.setdefault(key, []).append(default.log_ratio - verdict.standings[winner].log_ratio)
    return tuple(
        KernelWins(*key, points[key], wins.get(key, 0), math.exp(max(gains[key])) if key in gains else None)
        for key in sorted(points)
    )
