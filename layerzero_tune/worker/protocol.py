"""What the tuner and its worker process say to each other, pickled over a socket pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerzero_runtime.errors import LayerZeroError
from layerzero_tune.measure.contest import Contest, ContestOutcome, JobOutcome


@dataclass(frozen=True)
class Ready:
    """The worker has imported torch and its kernels, and takes requests."""


@dataclass(frozen=True)
class Request:
    """A contest to measure; `settled` holds outcomes that are known, by the index of the candidate."""

    contest: Contest
    settled: Mapping[int, JobOutcome]


@dataclass(frozen=True)
class Finished:
    """What a contest gave. `is_last`: the process ends with it, and another has to measure the next."""

    outcome: ContestOutcome
    is_last: bool = False


@dataclass(frozen=True)
class Loss:
    """The process died, was killed for its silence, or is of no use any more and ends: the candidate at whose step that
    came about (None: at none), and what that makes of it. `is_final`: to try again would not be worth the time."""

    candidate: int | None
    outcome: JobOutcome
    is_final: bool = False


@dataclass(frozen=True)
class Refusal:
    """The worker cannot do what was asked: `error` is raised in the tuner."""

    error: LayerZeroError


Reply = Ready | Finished | Loss | Refusal
