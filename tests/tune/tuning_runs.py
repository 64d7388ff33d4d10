"""Runs in this process, and what they tell their watcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from layerzero_runtime.context import SelectionContext
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_agenda import Planned
from layerzero_tune.search.tuning import FinishedContest, TuningEnd, TuningPlan, agenda_of, plan_tuning, tune
from layerzero_tune.workload.lines import WorkloadLine


class Seen:
    """A watcher that keeps what it is told, and may interrupt."""

    def __init__(self, then: Callable[[Seen], None] = lambda seen: None) -> None:
        self.begun: list[Planned] = []
        self.finished_contests: list[FinishedContest] = []
        self._then = then

    def begins(self, planned: Planned) -> None:
        self.begun.append(planned)

    def finished(self, finished: FinishedContest) -> None:
        self.finished_contests.append(finished)
        self._then(self)


def lines_at(contexts: Sequence[SelectionContext]) -> list[WorkloadLine]:
    return [WorkloadLine(context) for context in contexts]


def planned_at(device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore) -> TuningPlan:
    return plan_tuning(device, lines_at(contexts), store)


def agenda_at(
    device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore, *, refine: bool = False
) -> Agenda:
    return agenda_of(device, planned_at(device, contexts, store), refine=refine)


def run_at(
    device: MeasuringDevice,
    contexts: Sequence[SelectionContext],
    folder: Path,
    watcher: Seen | None = None,
    deadline: Deadline | None = None,
) -> TuningEnd:
    """A whole run over the points, into this folder."""
    store = ResultsStore(folder)
    agenda = agenda_at(device, contexts, store, refine=deadline is not None)
    return tune(device, agenda, store, watcher, deadline)
