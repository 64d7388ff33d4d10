"""A run: measure the contests of a workload that the store does not hold yet, the most valuable first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import Results, ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.budget import BudgetSpentError, Deadline
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_agenda import Planned
from layerzero_tune.workload.lines import WorkloadLine

# What the end of a run takes, compacting the files and summing up, on a 2-core AMD EPYC: so much at least, and so much
# per contest.
CLOSING_S = 1.0
CLOSING_PER_CONTEST_S = 0.002


@dataclass(frozen=True)
class TuningPlan:
    """What a run is about.

    Attributes:
        lines: the points with at least one contest, and their weights.
        offered: the contests of each point.
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
    offered = {line.context: device.contests(line.context) for line in lines}
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
    watcher = watcher or Unwatched()
    while True:
        closing_s = CLOSING_S + CLOSING_PER_CONTEST_S * agenda.held
        planned = agenda.next(math.inf if deadline is None else deadline.left_s() - closing_s)
        if planned is None:
            break
        watcher.begins(planned)
        start = perf_counter()
        try:
            rows, outcome = _measured(device, planned.contest, deadline, closing_s)
        except BudgetSpentError:
            break
        store.append(rows)
        # A replay takes no time that says anything.
        taken_s = perf_counter() - start - outcome.preparation_s if outcome.outcomes else None
        agenda.learn(planned, rows, taken_s)
        watcher.finished(FinishedContest(planned, rows, outcome.preparation_s, agenda.left))
    store.compact()
    return TuningEnd(agenda.waiting(), *agenda.expected_regret())


def _measured(
    device: MeasuringDevice, contest: Contest, deadline: Deadline | None, closing_s: float
) -> tuple[tuple[Measurement, ...], ContestOutcome]:
    if deadline is None:
        return device.measure(contest)
    with deadline.enforced(early_s=closing_s):
        return device.measure(contest)
