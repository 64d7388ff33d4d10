"""A run: measure the contests of a workload that the store does not hold yet, the most valuable first."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import sleep
from typing import Protocol

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.leases import Leases
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import Results, ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device import COMING, MeasuringDevice
from layerzero_tune.search.executor import Executor, InTurn, Measured
from layerzero_tune.search.key_agenda import Planned, searched_kernel
from layerzero_tune.workload.lines import WorkloadLine

# What the end of a run takes, compacting the files and summing up, on a 2-core AMD EPYC: so much at least, and so much
# per contest.
CLOSING_S = 1.0
CLOSING_PER_CONTEST_S = 0.002
# How often a run looks whether another one has finished what it waits for.
_LOOK_S = 0.5
# Beyond so many that rest, the next contest that is no search waits for its compilers before all others: what would
# come instead is worth less and less. In the 158 s in which an H100's 16 cores compile four modules of FlashInfer
# (0.6.6, nvcc 13.0, 2026-11-27) it measures about twice as many contests of attention.
_MOST_RESTING = 64
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningPlan:
    """What a run is about.

    Attributes:
        lines: the points with at least one contest, and their weights.
        offered: the contests of each point; those of configurations come on top, as they are found.
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
    known: dict[SelectionContext, dict[str, Sequence[Measurement]]] = {}
    for contest_id, rows in held.items():
        if not rows[0].is_search:
            known.setdefault(rows[0].context, {})[contest_id] = rows
    offered = {line.context: device.contests(line.context, known.get(line.context, {})) for line in lines}
    return TuningPlan(
        lines=tuple(line for line in lines if offered[line.context]),
        offered=offered,
        held=held,
        without_candidates=tuple(context for context, found in offered.items() if not found),
        quarantined=stored.quarantined,
    )


def agenda_of(device: MeasuringDevice, plan: TuningPlan, *, refine: bool) -> Agenda:
    """The agenda of a run over the plan: the workload's contests, and again those that were disturbed or whose verdict
    is in doubt; with `refine` also points between those of the workload, once these hardly lower the regret."""
    return Agenda(device, plan.lines, plan.offered, plan.held, refine=refine)


def tune(
    device: MeasuringDevice,
    agenda: Agenda,
    store: ResultsStore,
    watcher: Watcher | None = None,
    deadline: Deadline | None = None,
    executor: Executor | None = None,
) -> TuningEnd:
    """Measure what is on the agenda, each contest stored as soon as it has finished; then the files are
    compacted. The device offers the contests, and measures them as well where no executor is given.

    Without a deadline it ends when the agenda is empty. With one, what the time does not suffice for is skipped; a
    contest that is in flight a moment before the deadline is given up.

    Raises:
        ResultsError: the store cannot be written.
        LayerZeroError: the executor cannot measure any more.
    """
    _Run(device, agenda, store, watcher or Unwatched(), deadline, executor or InTurn(device)).measure_all()
    store.compact()
    return TuningEnd(agenda.waiting(), *agenda.expected_regret())


@dataclass(frozen=True)
class _Flight:
    """A contest that is being measured: what was planned (of a search, the first that its point offered), and its
    lease."""

    planned: Planned
    contest: Contest
    lease: ExitStack


class _Run:
    def __init__(
        self,
        device: MeasuringDevice,
        agenda: Agenda,
        store: ResultsStore,
        watcher: Watcher,
        deadline: Deadline | None,
        executor: Executor,
    ) -> None:
        self._device, self._agenda, self._store = device, agenda, store
        self._watcher, self._deadline, self._executor = watcher, deadline, executor
        self._leases = Leases(store.directory)
        self._seen: dict[str, frozenset[str]] = {}
        self._flights: dict[str, _Flight] = {}
        self._resting: list[tuple[Planned, Contest]] = []

    def measure_all(self) -> None:
        """Until the agenda or the time is at an end."""
        has_said_so = False
        try:
            while True:
                self._fill()
                if self._flights:
                    measured = self._executor.finished(self._left_s())
                    if measured is None:
                        return
                    self._take_in(measured)
                    continue
                others = self._agenda.bring_back()
                if not others or self._left_s() <= 0.0:
                    break
                if not has_said_so:  # nothing is left but what is in flight in another run
                    folder = self._store.directory
                    _logger.warning("another run measures %d contests into %s: waiting for it", others, folder)
                    has_said_so = True
                sleep(_LOOK_S)
        finally:
            for flight in self._flights.values():
                flight.lease.close()
        self._leases.clear()

    def _left_s(self) -> float:
        if self._deadline is None:
            return math.inf
        return self._deadline.left_s() - CLOSING_S - CLOSING_PER_CONTEST_S * self._agenda.held

    def _fill(self) -> None:
        """Have as many contests in flight as the executor measures at once."""
        while len(self._flights) < self._executor.slots:
            planned = self._next()
            if planned is None:
                return
            self._begin(planned)

    def _next(self) -> Planned | None:
        """What to begin now. What waits for compilers rests, and what these do not disturb is measured; it goes on as
        soon as they are done, or where nothing else is left."""
        if (planned := self._rested(lambda contest: not self._device.is_compiling(contest))) is not None:
            return planned
        while (planned := self._agenda.next(self._left_s(), beside_compilers=bool(self._resting))) is not None:
            if not self._rests(planned):
                return planned
            self._agenda.begin(planned)
        return self._rested(lambda contest: True)

    def _rested(self, is_ready: Callable[[Contest], bool]) -> Planned | None:
        """The first that rested, is ready, and still has the time that it takes; of a search that is any."""
        left_s = self._left_s()
        for place, (planned, contest) in enumerate(self._resting):
            if (planned.kind == "search" or planned.seconds <= left_s) and is_ready(contest):
                return self._resting.pop(place)[0]
        return None

    def _rests(self, planned: Planned) -> bool:
        """Whether something has to wait for compilers, which begin now."""
        if planned.kind != "search" and len(self._resting) >= _MOST_RESTING:
            return False
        contest = self._next_of(planned)
        if contest is None or not self._device.is_compiling(contest):
            return False
        self._resting.append((planned, contest))
        return True

    def _begin(self, planned: Planned) -> None:
        """Have a contest measured, unless another run has done so or is about to; of a search the next one at its
        point, until there is none."""
        while (contest := self._next_of(planned)) is not None:
            with ExitStack() as stack:
                if not stack.enter_context(self._leases.take(contest.contest_id)):
                    self._agenda.set_aside(planned)
                    return
                # Now that nobody else can be about to store it.
                rows = self._store.contest(contest.contest_id, self._seen)
                if not rows:
                    self._agenda.begin(planned)
                    step = replace(planned, contest=contest)
                    self._watcher.begins(step)
                    self._device.expect(self._coming())
                    self._executor.submit(contest)
                    self._flights[contest.contest_id] = _Flight(planned, contest, stack.pop_all())
                    return
                self._agenda.learn(planned, rows, contest=contest)
            if planned.kind != "search":
                return
        self._agenda.strike(planned)

    def _next_of(self, planned: Planned) -> Contest | None:
        """The planned contest, if it is still missing; of a search, which begins with what others have given by now,
        its next one until it is over."""
        if planned.kind != "search":
            return planned.contest if planned.contest.contest_id not in self._agenda.done else None
        assert self._device.searches is not None
        kernel_id, context = searched_kernel(planned), planned.contest.context
        step = self._device.searches.step(context, kernel_id, self._agenda.searched)
        return None if step is None else step.contest

    def _coming(self) -> Iterator[Contest]:
        """What is likely to be measured next, worked out where somebody asks."""
        yield from (contest for _, contest in self._resting)
        for planned in self._agenda.coming(COMING):
            contest = self._next_of(planned)
            if contest is not None:
                yield contest

    def _take_in(self, measured: Measured) -> None:
        flight = self._flights[measured.contest.contest_id]
        planned, outcome = flight.planned, measured.outcome
        self._store.append(measured.rows)
        del self._flights[flight.contest.contest_id]
        flight.lease.close()
        # A replay takes no time that says anything.
        taken_s = measured.taken_s - outcome.preparation_s if outcome.outcomes else None
        self._agenda.learn(planned, measured.rows, taken_s, outcome.preparation_s, flight.contest)
        step = replace(planned, contest=flight.contest)
        self._watcher.finished(FinishedContest(step, measured.rows, outcome.preparation_s, self._agenda.left))
        if planned.kind == "search" and not self._rests(planned):
            self._begin(planned)
