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
from layerzero_tune.search.configurations.searched import Searched
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
        contests: what is to be measured first: contests that the store lacks, then those that left a doubt, again. That
            of a search of configurations stands for all that follow at its point.
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
    searched = _searched(done)
    by_point = {context: device.contests(context, searched) for context in dict.fromkeys(contexts)}
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
    run = _Run(device, plan, store, progress)
    wanted = plan.contests
    while wanted:
        run.measure_all(wanted)
        wanted = _wanted(device, tuple(run.offered.values()), run.done)
    run.leases.clear()
    store.compact()


def _searched(done: RowsByContest) -> Searched:
    return Searched(row for rows in done.values() for row in rows)


class _Run:
    """What is known while a run goes on: the rows by contest, what searches have found, and the contests that points
    offer, to which a search adds the one that it ends with."""

    def __init__(
        self,
        device: MeasuringDevice,
        plan: TuningPlan,
        store: ResultsStore,
        progress: Callable[[FinishedContest], None],
    ) -> None:
        self.done: dict[str, Sequence[Measurement]] = dict(plan.done)
        self.offered = {contest.contest_id: contest for contest in plan.offered if not contest.is_search}
        self.leases = Leases(store.directory)
        self._device, self._store, self._progress = device, store, progress
        self._searched = _searched(self.done)
        self._seen: dict[str, frozenset[str]] = {}

    def measure_all(self, wanted: Sequence[Contest]) -> None:
        """Each contest is measured, unless another run into the folder does so or has done so."""
        waiting, elsewhere, has_said_so = deque(wanted), 0, False
        while waiting:
            if elsewhere == len(waiting):  # nothing is left but what is in flight in another run
                if not has_said_so:
                    folder = self._store.directory
                    _logger.warning("another run measures %d contests into %s: waiting for it", elsewhere, folder)
                has_said_so, elsewhere = True, 0
                sleep(_LOOK_S)
            planned = waiting.popleft()
            contest = self._next_of(planned)
            if contest is None:
                continue
            with self.leases.take(contest.contest_id) as is_ours:
                if not is_ours:
                    waiting.append(planned)
                    elsewhere += 1
                    continue
                elsewhere = 0
                rows = self._rows(contest, len(waiting))
            self.done[contest.contest_id] = rows
            self._searched.add(rows)
            if contest.is_search:
                waiting.appendleft(planned)
            elif planned.is_search:
                self.offered[contest.contest_id] = contest

    def _rows(self, contest: Contest, left: int) -> Sequence[Measurement]:
        """What the store holds of the contest, now that nobody else can be about to store it, or else measures give."""
        rows: Sequence[Measurement] = self._store.contest(contest.contest_id, self._seen)
        if not rows:
            rows, outcome = self._device.measure(contest)
            self._store.append(rows)
            self._progress(FinishedContest(contest, tuple(rows), outcome.preparation_s, left + contest.is_search))
        return rows

    def _next_of(self, planned: Contest) -> Contest | None:
        """The planned contest, if it is still missing; for that of a search, which begins with what its neighbours have
        given by now, whatever its point offers until the search is over."""
        offered = self._device.contests(planned.context, self._searched) if planned.is_search else (planned,)
        return next((contest for contest in offered if contest.contest_id not in self.done), None)


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
