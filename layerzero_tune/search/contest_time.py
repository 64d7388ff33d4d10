"""How long a contest takes: from its policy and the times of calls, those of a neighbour or of a roofline guess."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.results.measurement import Measurement

# What a contest takes beside its clock: inputs, the float64 reference, the checks. Over 3,900 contests of both presets
# on a 2-core AMD EPYC the wall time was 2.3 to 3.0 times what the clock of the policy takes. A run corrects it by what
# its own contests take.
OVERHEAD = 2.5
OVERHEAD_S = 0.05
# Guesses for a call of which nothing is known, on the slow side: operations per second of a core that nobody has
# measured, and of a GPU.
GUESSED_FLOPS = {"cpu": 6e10, "cuda": 3e13}
GUESSED_CALL_S = 2e-5
# One contest counts for so many times what was expected of it at most: one that waited for a quiet machine says nothing
# of the others.
LONGEST = 4.0
# Candidates that reach the final rounds where nothing says how many: the default and the two best.
GUESSED_FINALISTS = 3


@dataclass(frozen=True)
class CallTimes:
    """What a call of each candidate takes in s, and which of them had final rounds."""

    screened: tuple[float, ...]
    finalists: tuple[float, ...]

    def scaled(self, factor: float) -> CallTimes:
        return CallTimes(tuple(t * factor for t in self.screened), tuple(t * factor for t in self.finalists))


def call_times(rows: Iterable[Measurement]) -> CallTimes:
    """Those of a contest's rows; candidates without a time took none."""
    timed = [row for row in rows if row.screen_ns is not None]
    seconds = [(row.screen_ns or 0.0) * 1e-9 for row in timed]
    return CallTimes(tuple(seconds), tuple(s for s, row in zip(seconds, timed, strict=True) if row.samples_ns))


def guessed_call_times(operation: Operation, context: SelectionContext, candidates: int, platform: str) -> CallTimes:
    """By the work of the call alone."""
    call = GUESSED_CALL_S + operation.flops(context) / GUESSED_FLOPS.get(platform, GUESSED_FLOPS["cpu"])
    return CallTimes((call,) * candidates, (call,) * min(candidates, GUESSED_FINALISTS))


def contest_s(calls: CallTimes, policy: MeasurementPolicy) -> float:
    """Wall time of a contest in s. Every step takes as long as the policy says, and one call at least."""
    slowest = policy.max_call_ms * 1e-3
    screening = sum(max(policy.warmup_ms * 1e-3, call) + max(policy.screen_ms * 1e-3, call) for call in calls.screened)
    rounds = sum(policy.rounds * max(policy.round_ms * 1e-3, call) for call in calls.finalists if call <= slowest)
    return OVERHEAD_S + OVERHEAD * (screening + rounds)


def scaled_to(operation: Operation, context: SelectionContext, near: SelectionContext, calls: CallTimes) -> CallTimes:
    """The times of a neighbour, as the work of both says."""
    return calls.scaled(max(1, operation.flops(context)) / max(1, operation.flops(near)))


# Contests by what their kernels need before the clock begins: the first of a static key, where all is loaded and
# compiled, the later ones, and those of a search, where each configuration is compiled.
Stage = Literal["first", "later", "search"]


class ContestClock:
    """What contests have taken, against what was expected of them: the correction of later expectations."""

    def __init__(self) -> None:
        self._expected_s = 0.0
        self._taken_s = 0.0
        self._preparations: dict[Stage, tuple[int, float]] = {}

    def learn(self, expected_s: float, taken_s: float) -> None:
        self._expected_s += expected_s
        self._taken_s += min(taken_s, LONGEST * expected_s)

    @property
    def correction(self) -> float:
        """Their ratio over all contests, 1 before the first."""
        return self._taken_s / self._expected_s if self._expected_s > 0.0 else 1.0

    def learn_preparation(self, stage: Stage, seconds: float) -> None:
        """What loading and compiling the kernels of a contest took."""
        count, total = self._preparations.get(stage, (0, 0.0))
        self._preparations[stage] = count + 1, total + seconds

    def preparation_s(self, stage: Stage) -> float:
        """Their mean, 0 before the first."""
        count, total = self._preparations.get(stage, (0, 0.0))
        return total / count if count else 0.0
