"""Speed and coverage in figures, per operation and mode and over all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from layerzero_tune.diff.comparison import ShapeChange


@dataclass(frozen=True)
class SpeedSummary:
    """How the new table compares with the old one over shapes of one operation and mode.

    Speeds are the old plan's time over the new one's, weighted, over the shapes that both serve and whose plans' times
    are known; None without such shapes.

    Attributes:
        shapes: shapes in all.
        missing: those that one table or both miss; `gained` are served by the new one alone, `lost` by the old one.
        other_plan: those that both serve with different plans; the ratios of these are `measured`, `estimated` or
            `unknown`.
        speed: geometric mean.
        worst, best: the lowest and the highest.
        total_time: weighted time of all, new over old; None where a time is missing.
    """

    operation: str
    mode: str
    shapes: int
    missing: int
    gained: int
    lost: int
    other_plan: int
    measured: int
    estimated: int
    unknown: int
    speed: float | None
    worst: float | None
    best: float | None
    total_time: float | None


def summarise(changes: Sequence[ShapeChange]) -> tuple[SpeedSummary, ...]:
    """One summary for each operation and mode in order of name, and the one over all last."""
    grouped: dict[tuple[str, str], list[ShapeChange]] = {}
    for change in changes:
        operation, (mode, *_) = change.shape.key
        grouped.setdefault((operation, mode), []).append(change)
    parts = [_summary(*names, grouped[names]) for names in sorted(grouped)]
    return (*parts, _summary("all", "all", changes))


def _summary(operation: str, mode: str, changes: Sequence[ShapeChange]) -> SpeedSummary:
    both = [change for change in changes if change.old is not None and change.new is not None]
    known = [(change.shape.weight, change.gain.log_ratio) for change in both if change.gain is not None]
    total = math.fsum(weight for weight, _ in known)
    gains = [gain for _, gain in known]
    bases = Counter(change.gain and change.gain.basis for change in both if change.old != change.new)
    return SpeedSummary(
        operation=operation,
        mode=mode,
        shapes=len(changes),
        missing=len(changes) - len(both),
        gained=sum(change.old is None and change.new is not None for change in changes),
        lost=sum(change.old is not None and change.new is None for change in changes),
        other_plan=bases.total(),
        measured=bases["measured"],
        estimated=bases["estimated"],
        unknown=bases[None],
        speed=math.exp(math.fsum(weight * gain for weight, gain in known) / total) if known else None,
        worst=math.exp(min(gains)) if gains else None,
        best=math.exp(max(gains)) if gains else None,
        total_time=_total_time(both),
    )


def _total_time(changes: Sequence[ShapeChange]) -> float | None:
    before, after = [], []
    for change in changes:
        if change.time_ns is None or change.gain is None:
            return None
        after.append(change.shape.weight * change.time_ns)
        before.append(after[-1] * math.exp(change.gain.log_ratio))
    return math.fsum(after) / math.fsum(before) if before else None
