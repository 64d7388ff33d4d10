"""A run: measure the contests of a workload that the store does not hold yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerzero_runtime.context import SelectionContext
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
    """A contest that was just stored: its rows, and the time that loading and compiling its kernels took in s."""

    contest: Contest
    rows: tuple[Measurement, ...]
    preparation_s: float


def plan_tuning(device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore) -> TuningPlan:
    """The contests of the points that are missing from the store, in the order of the points.

    Raises:
        ResultsError: the store cannot be read.
    """
    held = store.read() if store.directory.exists() else Results((), ())
    done = {row.contest_id for row in held.rows}
    offered = {context: device.contests(context) for context in dict.fromkeys(contexts)}
    contests = {contest.contest_id: contest for found in offered.values() for contest in found}
    return TuningPlan(
        contests=tuple(contest for contest_id, contest in contests.items() if contest_id not in done),
        held=len(contests.keys() & done),
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

    Raises:
        ResultsError: the store cannot be written.
    """
    for contest in plan.contests:
        rows, outcome = device.measure(contest)
        store.append(rows)
        progress(FinishedContest(contest, rows, outcome.preparation_s))
    store.compact()
