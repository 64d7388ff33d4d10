"""A run: measure the contests of a workload that the store does not hold yet, and those that were disturbed again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.distrust import is_disturbed
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import Results, ResultsStore
from layerzero_tune.search.device import MeasuringDevice


@dataclass(frozen=True)
class TuningPlan:
    """What a run will do: contests to measure, how many the store holds already, points without any candidate, and the
    damaged files that were set aside, whose contests count as missing."""

    contests: tuple[Contest, ...]
    held: int
    without_candidates: tuple[SelectionContext, ...]
    quarantined: tuple[Path, ...]


@dataclass(frozen=True)
class FinishedContest:
    """A contest that was just stored: its rows, the time that loading and compiling its kernels took in s, and how many
    contests are left, those included that were disturbed and come again."""

    contest: Contest
    rows: tuple[Measurement, ...]
    preparation_s: float
    left: int


def plan_tuning(device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore) -> TuningPlan:
    """The contests of the points that are missing from the store, in the order of the points; after them those that the
    store holds, disturbed, and the device offers again.

    Raises:
        ResultsError: the store cannot be read.
    """
    held = store.read() if store.directory.exists() else Results((), ())
    done: dict[str, list[Measurement]] = {}
    for row in held.rows:
        done.setdefault(row.contest_id, []).append(row)
    offered = {context: device.contests(context) for context in dict.fromkeys(contexts)}
    contests = {contest.contest_id: contest for found in offered.values() for contest in found}
    found = [contest for contest_id, contest in contests.items() if contest_id in done]
    return TuningPlan(
        contests=(
            *(contest for contest_id, contest in contests.items() if contest_id not in done),
            *(again for contest in found if (again := _unfinished(device, contest, done)) is not None),
        ),
        held=len(found),
        without_candidates=tuple(context for context, found in offered.items() if not found),
        quarantined=held.quarantined,
    )


def tune(
    device: MeasuringDevice,
    plan: TuningPlan,
    store: ResultsStore,
    progress: Callable[[FinishedContest], None] = lambda finished: None,
) -> None:
    """Measure the plan's contests, each stored as soon as it has finished; at the end the files are compacted.

    A disturbed contest comes again once all others are done: what disturbed it may be gone by then.

    Raises:
        ResultsError: the store cannot be written.
    """
    waiting = deque(plan.contests)
    while waiting:
        contest = waiting.popleft()
        rows, outcome = device.measure(contest)
        store.append(rows)
        again = device.again(contest) if _is_disturbed(rows) else None
        if again is not None:
            waiting.append(again)
        progress(FinishedContest(contest, rows, outcome.preparation_s, len(waiting)))
    store.compact()


def _unfinished(device: MeasuringDevice, contest: Contest, done: Mapping[str, Sequence[Measurement]]) -> Contest | None:
    """The repeat of a stored contest that is still to be measured, because all before it were disturbed."""
    following: Contest | None = contest
    while following is not None and following.contest_id in done:
        following = device.again(following) if _is_disturbed(done[following.contest_id]) else None
    return following


def _is_disturbed(rows: Sequence[Measurement]) -> bool:
    timed = [row for row in rows if row.status == "ok"]
    return bool(timed) and is_disturbed(timed)
