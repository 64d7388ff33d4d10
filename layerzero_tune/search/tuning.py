"""A run: measure the contests of a workload that the store does not hold yet, and again those that leave a doubt."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.leases import Leases
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import Results, ResultsStore
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.doubt import leaves_doubt

# How often a run looks whether another one has finished what it waits for.
_LOOK_S = 0.5
_logger = logging.getLogger(__name__)

RowsByContest = Mapping[str, Sequence[Measurement]]


@dataclass(frozen=True)
class TuningPlan:
    """What a run will do.

    Attributes:
        offered: the first contests of all points, in their order.
        done: the rows that the store holds already, by contest.
        contests: what is to be measured first: contests that the store lacks, then those that left a doubt, again.
        without_candidates: points without any candidate.
        quarantined: damaged files that were set aside; their contests count as missing.
    """

    offered: tuple[Contest, ...]
    done: RowsByContest
    contests: tuple[Contest, ...]
    without_candidates: tuple[SelectionContext, ...]
    quarantined: tuple[Path, ...]

    @property
    def held(self) -> int:
        """How many of the offered contests the store holds."""
        return sum(contest.contest_id in self.done for contest in self.offered)


@dataclass(frozen=True)
class FinishedContest:
    """A contest that was just stored: its rows, the time that loading and compiling its kernels took in s, and how many
    of those that are known to be wanted are left."""

    contest: Contest
    rows: tuple[Measurement, ...]
    preparation_s: float
    left: int


def plan_tuning(device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore) -> TuningPlan:
    """What the points ask for beside what the store holds.

    Raises:
        ResultsError: the store cannot be read.
    """
    held = store.read() if store.directory.exists() else Results((), ())
    done: dict[str, list[Measurement]] = {}
    for row in held.rows:
        done.setdefault(row.contest_id, []).append(row)
    by_point = {context: device.contests(context) for context in dict.fromkeys(contexts)}
    offered = tuple({contest.contest_id: contest for found in by_point.values() for contest in found}.values())
    return TuningPlan(
        offered=offered,
        done=done,
        contests=_wanted(device, offered, done),
        without_candidates=tuple(context for context, found in by_point.items() if not found),
        quarantined=held.quarantined,
    )


def tune(
    device: MeasuringDevice,
    plan: TuningPlan,
    store: ResultsStore,
    progress: Callable[[FinishedContest], None] = lambda finished: None,
) -> None:
    """Measure the plan's contests, then again and again those that leave a doubt, each stored as soon as it has
    finished; at the end the files are compacted.

    Repeats come after all others: what disturbed a contest may be gone by then, and what was so by chance is not so
    again.

    Raises:
        ResultsError: the store cannot be written.
    """
    done: dict[str, Sequence[Measurement]] = dict(plan.done)
    wanted = plan.contests
    leases = Leases(store.directory)
    while wanted:
        done |= _measure_all(device, wanted, store, leases, progress)
        wanted = _wanted(device, plan.offered, done)
    leases.clear()
    store.compact()


def _measure_all(
    device: MeasuringDevice,
    wanted: Sequence[Contest],
    store: ResultsStore,
    leases: Leases,
    progress: Callable[[FinishedContest], None],
) -> RowsByContest:
    """The rows of the contests: each is measured, unless another run into the folder does so or has done so."""
    found: dict[str, Sequence[Measurement]] = {}
    seen: dict[str, frozenset[str]] = {}
    waiting, elsewhere, has_said_so = deque(wanted), 0, False
    while waiting:
        if elsewhere == len(waiting):  # nothing is left but what is in flight in another run
            if not has_said_so:
                _logger.warning("another run measures %d contests into %s: waiting for it", elsewhere, store.directory)
            has_said_so, elsewhere = True, 0
            sleep(_LOOK_S)
        contest = waiting.popleft()
        with leases.take(contest.contest_id) as is_ours:
            if not is_ours:
                waiting.append(contest)
                elsewhere += 1
                continue
            elsewhere = 0
            rows = store.contest(contest.contest_id, seen)  # now that nobody else can be about to store it
            if not rows:
                rows, outcome = device.measure(contest)
                store.append(rows)
                progress(FinishedContest(contest, rows, outcome.preparation_s, len(waiting)))
            found[contest.contest_id] = rows
    return found


def _wanted(device: MeasuringDevice, offered: Sequence[Contest], done: RowsByContest) -> tuple[Contest, ...]:
    """The contests that were not measured yet, then the next repeats of those that left a doubt."""
    missing = tuple(contest for contest in offered if contest.contest_id not in done)
    return missing + tuple(_repeats(device, (contest for contest in offered if contest.contest_id in done), done))


def _repeats(device: MeasuringDevice, contests: Iterator[Contest], done: RowsByContest) -> Iterator[Contest]:
    for contest in contests:
        rows: list[Measurement] = []
        following: Contest | None = contest
        while following is not None and following.contest_id in done:
            rows += done[following.contest_id]
            following = device.again(following)
        if following is not None and leaves_doubt(rows):
            yield following
