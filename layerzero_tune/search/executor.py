"""Executors: where the contests of a run are measured, one after the other or several at a time."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.budget import BudgetSpentError, Deadline
from layerzero_tune.search.device import MeasuringDevice


@dataclass(frozen=True)
class Measured:
    """A contest that has finished: its rows, what came of it, and the seconds from its begin to its end."""

    contest: Contest
    rows: tuple[Measurement, ...]
    outcome: ContestOutcome
    taken_s: float


class Executor(Protocol):
    """Takes contests and gives them back finished. The results are the caller's to store."""

    @property
    def slots(self) -> int:
        """How many contests it measures at once; may change."""

    def submit(self, contest: Contest) -> None:
        """Begin a contest; not more at once than there are slots."""

    def finished(self, within_s: float) -> Measured | None:
        """The next submitted contest that has finished; None where there is none within so many seconds, which ends
        the run: what is in flight then is given up.

        Raises:
            LayerZeroError: nothing can be measured any more.
        """


def measured_on(device: MeasuringDevice, contest: Contest) -> Measured:
    """The contest, measured here and now."""
    start = perf_counter()
    rows, outcome = device.measure(contest)
    return Measured(contest, rows, outcome, perf_counter() - start)


class InTurn:
    """One device, on which this thread measures; the main thread, where there is a limit of time."""

    slots = 1

    def __init__(self, device: MeasuringDevice) -> None:
        self._device = device
        self._submitted: list[Contest] = []

    def submit(self, contest: Contest) -> None:
        self._submitted.append(contest)

    def finished(self, within_s: float) -> Measured | None:
        contest = self._submitted.pop()
        try:
            with nullcontext() if math.isinf(within_s) else Deadline.after(within_s).enforced():
                return measured_on(self._device, contest)
        except BudgetSpentError:
            return None
