"""A run: measure the contests of a workload that the store does not hold yet, the most valuable first."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Protocol

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.leases import Leases
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import Results, ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.budget import BudgetSpentError, Deadline
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_agenda import Planned
from layerzero_tune.workload.lines import WorkloadLine

# What the end of a run takes, compacting the files and summing up, on a 2-core AMD EPYC: so much at least, and so much
# per contest.
CLOSING_S = 1.0
CLOSING_PER_CONTEST_S = 0.002
# So many contests ahead kernels are compiled: a search's contest has 8 to compile in seconds, and is timed in one.
COMING = 2
# How often a run looks whether another one has finished what it waits for.
_LOOK_S = 0.5
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningPlan:
    """What a run is about.

    Attributes:
        lines: the points with at least one contest, and their weights.
        offered: the contests of each point; that of a search of configurations stands for all that follow there.
        held: the rows that the store holds, by contest.
        without_candidates: points at which nothing can be measured.
        quarantined: damaged files that were set aside, whose contests count as missing.
    """

    lines: tuple[WorkloadLine, ...]
    offered: Mapping[SelectionContext, Sequence[Contest]]
    held: Mapping[str, Sequence[Measurement]]
    without_candidates: tuple[SelectionContext, ...]
    quarantined: tuple[Path, ...]

    @property
    def missing(self) -> tuple[Contest, ...]:
        """The points' contests that the store does not hold, in the order of the points."""
        contests = {contest.contest_id: contest for found in self.offered.values() for contest in found}
        return tuple(contest for contest_id, contest in contests.items() if contest_id not in self.held)

    @property
    def found(self) -> int:
        """How many of the points' contests the store holds."""
        return len({contest.contest_id for found in self.offered.values() for contest in found} & self.held.keys())


@dataclass(frozen=True)
class FinishedContest:
    """A contest that was just stored: its rows, the time that loading and compiling its kernels took in s, and how many
    contests are known to be left."""

    planned: Planned
    rows: tuple[Measurement, ...]
    preparation_s: float
    left: int

    @property
    def contest(self) -> Contest:
        return self.planned.contest


@dataclass(frozen=True)
class TuningEnd:
    """What a run leaves.

    Attributes:
        skipped: the workload's contests that were not measured, for want of time.
        regret: the expected regret (log ratio) at the workload's points: the weighted mean.
        worst_regret: the largest of them.
    """

    skipped: tuple[Planned, ...]
    regret: float
    worst_regret: float


class Watcher(Protocol):
    """Who is told of each contest."""

    def begins(self, planned: Planned) -> None: ...

    def finished(self, finished: FinishedContest) -> None: ...


class Unwatched:
    """Tells nobody."""

    def begins(self, planned: Planned) -> None:
        """Nothing."""

    def finished(self, finished: FinishedContest) -> None:
        """Nothing."""


def plan_tuning(device: MeasuringDevice, lines: Sequence[WorkloadLine], store: ResultsStore) -> TuningPlan:
    """The contests of the points, and what the store holds of them.

    Raises:
        ResultsError: the store cannot be read.
    """
    stored = store.read() if store.directory.exists() else Results((), ())
    held: dict[str, list[Measurement]] = {}
    for row in stored.rows:
        held.setdefault(row.contest_id, []).append(row)
    searched = Searched(row for rows in held.values() for row in rows)
    offered = {line.context: device.contests(line.context, searched) for line in lines}
    return TuningPlan(
        lines=tuple(line for line in lines if offered[line.context]),
        offered=offered,
        held=held,
        without_candidates=tuple(context for context, found in offered.items() if not found),
        quarantined=stored.quarantined,
    )


def agenda_of(device: MeasuringDevice, plan: TuningPlan, *, refine: bool) -> Agenda:
    """The agenda of a run over the plan: the workload's contests, and again those that were disturbed or whose verdict
    is in doubt; with `refine` also points between those of the workload, after them."""
    return Agenda(device, plan.lines, plan.offered, plan.held, refine=refine)


def tune(
    device: MeasuringDevice,
    agenda: Agenda,
    store: ResultsStore,
    watcher: Watcher | None = None,
    deadline: Deadline | None = None,
) -> TuningEnd:
    """Measure what is on the agenda, each contest stored as soon as it has finished; then the files are
    compacted.

    Without a deadline it ends when the agenda is empty. With one, what the time does not suffice for is skipped; a
    contest that is in flight a moment before the deadline is given up.

    Raises:
        ResultsError: the store cannot be written.
    """
    run = _Run(device, agenda, store, watcher or Unwatched(), deadline)
    with suppress(BudgetSpentError):
        run.measure_all()
    store.compact()
    return TuningEnd(agenda.waiting(), *agenda.expected_regret())


class _Run:
    def __init__(
        self,
        device: MeasuringDevice,
        agenda: Agenda,
        store: ResultsStore,
        watcher: Watcher,
        deadline: Deadline | None,
    ) -> None:
        self._device, self._agenda, self._store = device, agenda, store
        self._watcher, self._deadline = watcher, deadline
        self._leases = Leases(store.directory)
        self._seen: dict[str, frozenset[str]] = {}

    def measure_all(self) -> None:
        """Until the agenda or the time is at an end.

        Raises:
            BudgetSpentError: the deadline came in the middle of a contest.
        """
        has_said_so = False
        while True:
            left_s = math.inf if self._deadline is None else self._deadline.left_s() - self._closing_s
            planned = self._agenda.next(left_s)
            if planned is not None:
                if not self._is_done(planned):
                    self._agenda.set_aside(planned)
                continue
            others = self._agenda.bring_back()
            if not others or left_s <= 0.0:
                break
            if not has_said_so:  # nothing is left but what is in flight in another run
                folder = self._store.directory
                _logger.warning("another run measures %d contests into %s: waiting for it", others, folder)
                has_said_so = True
            sleep(_LOOK_S)
        self._leases.clear()

    @property
    def _closing_s(self) -> float:
        return CLOSING_S + CLOSING_PER_CONTEST_S * self._agenda.held

    def _is_done(self, planned: Planned) -> bool:
        """Measure a contest, unless another run into the folder has done so; of a search all contests at its point.
        False where another run is about to."""
        while (contest := self._next_of(planned)) is not None:
            with self._leases.take(contest.contest_id) as is_ours:
                if not is_ours:
                    return False
                # Now that nobody else can be about to store it.
                rows: Sequence[Measurement] = self._store.contest(contest.contest_id, self._seen)
                if rows:
                    self._agenda.learn(planned, rows, contest=contest)
                else:
                    self._measure(planned, contest)
            if not planned.contest.is_search:
                return True
        self._agenda.strike(planned)
        return True

    def _next_of(self, planned: Planned) -> Contest | None:
        """The planned contest, if it is still missing; for that of a search, which begins with what its neighbours have
        given by now, whatever its point offers until the search is over."""
        offered: Sequence[Contest] = (planned.contest,)
        if planned.contest.is_search:
            offered = self._device.contests(planned.contest.context, self._agenda.searched)
        return next((contest for contest in offered if contest.contest_id not in self._agenda.done), None)

    def _coming(self) -> Iterator[Contest]:
        """What is likely to be measured next, worked out where somebody asks."""
        for planned in self._agenda.coming(COMING):
            contest = self._next_of(planned)
            if contest is not None:
                yield contest

    def _measure(self, planned: Planned, contest: Contest) -> None:
        step = replace(planned, contest=contest)
        self._watcher.begins(step)
        start = perf_counter()
        deadline = self._deadline
        self._device.expect(self._coming())
        with nullcontext() if deadline is None else deadline.enforced(early_s=self._closing_s):
            rows, outcome = self._device.measure(contest)
        self._store.append(rows)
        # A replay takes no time that says anything, and a search more than the first of its contests.
        is_timed = outcome.outcomes and not planned.contest.is_search
        taken_s = perf_counter() - start - outcome.preparation_s if is_timed else None
        self._agenda.learn(planned, rows, taken_s, contest)
        self._watcher.finished(FinishedContest(step, rows, outcome.preparation_s, self._agenda.left))
