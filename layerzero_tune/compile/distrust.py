"""Distrust: contests that something disturbed, and how far their ratios may be off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_tune.measure.statistics import (
    LOG_RESOLUTION,
    Logs,
    half_shift,
    paired_logs,
    rank_correlation,
    student_t_upper_tail,
)
from layerzero_tune.results.measurement import Measurement

# A series of rounds moves where chance gives its rank correlation with their order in one case of a hundred. Simulated
# with 10 rounds, a trend or a step in the middle of 5 standard deviations is found in 87 and 46% of the cases, with 16
# rounds in 99 and 98%. A step near either end is missed: the interquartile mean ignores these rounds as well.
DRIFT_LEVEL = 0.01
# Candidates take turns in a shuffled order, so of a drift at most one round's share is left in a round's ratio. It
# counts where that share is above 0.5%, less than which no contest repeats.
ROUND_SHARE = 0.005


def is_disturbed(rows: Sequence[Measurement]) -> bool:
    """Whether a contest, given by all its rows, ran beside other processes or on a GPU that was slowed down, or its
    anchor drifted.

    The anchor is the default, or without its rounds the first kernel that has some.
    """
    return rows[0].is_contended or rows[0].is_slowed or _drifts(rows)


def doubts(row: Measurement, logs: Logs) -> list[float]:
    """How far each paired log ratio (choices, rounds) of a disturbed contest, of which `row` is one, may be off.

    What a drift does to both sides alike cancels. What it does to one of them makes the ratio move, too: the interval
    is then widened by its step from the first half of the rounds to the second, so that it holds the ratio at either
    end. (Of 1,884 contests on a Xeon 70 are distrusted; their ratios moved by 2.9% in the median, others' by 1.6%.)

    Beside it a neighbour that is busy for a share f of the time of one core makes a kernel that waits for this core up
    to 1 + f times as slow, and another one not at all.
    """
    contended = 0.0
    if row.is_contended:
        device = DeviceSpec.from_dict(row.device)
        busy = min(1.0, row.contention * (device.threads or device.physical_cores or 1))
        contended = round(math.log1p(busy) / LOG_RESOLUTION) * LOG_RESOLUTION
    steps = np.abs(half_shift(logs)).tolist()
    return [
        contended + (step * LOG_RESOLUTION if _moves(series) else 0.0) for step, series in zip(steps, logs, strict=True)
    ]


def disturbed_contests(rows: Iterable[Measurement]) -> frozenset[str]:
    """The ids of the contests with a time that are distrusted; searches decide nothing."""
    contests: dict[str, list[Measurement]] = {}
    for row in rows:
        if row.status == "ok" and not row.is_search:
            contests.setdefault(row.contest_id, []).append(row)
    return frozenset(contest_id for contest_id, found in contests.items() if is_disturbed(found))


def disturbed_points(rows: Sequence[Measurement]) -> frozenset[SelectionContext]:
    """The points with a time at which every contest is distrusted."""
    disturbed = disturbed_contests(rows)
    timed = [row for row in rows if row.status == "ok" and not row.is_search]
    return frozenset(row.context for row in timed) - {row.context for row in timed if row.contest_id not in disturbed}


def _drifts(rows: Sequence[Measurement]) -> bool:
    timed = (row for row in rows if row.samples_ns)
    anchor = min(timed, key=lambda row: (not row.is_default, row.job_id), default=None)
    if anchor is None:
        return False
    rounds = len(anchor.samples_ns)
    (logs,) = paired_logs([anchor.samples_ns], [anchor.samples_ns[0]] * rounds)
    # Between the middles of both halves lies half of the drift.
    drift = 2.0 * abs(int(half_shift(logs))) * LOG_RESOLUTION
    return drift > ROUND_SHARE * rounds and _moves(logs)


def _moves(logs: Logs) -> bool:
    """Whether a series of rounds rises or falls by more than chance: Student's t on Spearman's rank correlation."""
    rounds = len(logs)
    correlation = abs(rank_correlation(logs))
    if rounds < 3 or correlation >= 1.0:
        return rounds >= 3
    t = correlation * math.sqrt((rounds - 2) / (1.0 - correlation**2))
    return 2.0 * student_t_upper_tail(t, rounds - 2) < DRIFT_LEVEL
