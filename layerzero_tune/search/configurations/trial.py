"""Trials: what the results say of a kernel's configurations at a point."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from layerzero_runtime.kernel import Configuration
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.measurement import Measurement

OWN_CHOICE = canonical_json({})


@dataclass(frozen=True)
class Trial:
    """A configuration that was measured at a point.

    Attributes:
        log_ratio: log(its time / the time of the kernel's own choice), the mean over the contests that timed both; None
            where there is none.
        time_ns: its shortest screening time in ns, None where it failed.
        batch: the number of the contest that measured it first, from 0.
    """

    configuration: Configuration
    log_ratio: float | None = None
    time_ns: float | None = None
    batch: int = 0


def text_of(configuration: Configuration) -> str:
    """What tells configurations apart: 1, 1.0 and True are others."""
    return canonical_json(dict(configuration))


def trials_of(rows: Iterable[Measurement]) -> tuple[Trial, ...]:
    """The trials that one kernel's rows at one point hold, in the order in which they were first measured.

    Times are compared within contests alone: a contest in which the kernel's own choice has no time tells no ratio.
    """
    contests: dict[str, dict[str, Measurement]] = {}
    for row in sorted(rows, key=lambda row: (row.measured_at, row.contest_id, row.job_id)):
        contests.setdefault(row.contest_id, {})[text_of(row.configuration)] = row
    ratios: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    configurations: dict[str, tuple[Configuration, int]] = {}
    for number, contest in enumerate(contests.values()):
        own = contest.get(OWN_CHOICE)
        anchor = None if own is None else own.screen_ns
        for text, row in contest.items():
            if text == OWN_CHOICE:
                continue
            configurations.setdefault(text, (row.configuration, number))
            if row.status == "ok" and row.screen_ns is not None:
                times.setdefault(text, []).append(row.screen_ns)
                if anchor is not None:
                    ratios.setdefault(text, []).append(math.log(row.screen_ns / anchor))
    return tuple(
        Trial(
            configuration,
            math.fsum(ratios[text]) / len(ratios[text]) if text in ratios else None,
            min(times[text]) if text in times else None,
            batch,
        )
        for text, (configuration, batch) in configurations.items()
    )
