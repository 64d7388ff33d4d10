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
class Refusal:
    """The worker cannot do what was asked: `error` is raised in the tuner."""

    error: LayerZeroError


Reply = Ready | ContestOutcome | Refusal
