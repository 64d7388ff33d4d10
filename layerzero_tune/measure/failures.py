"""What becomes of a kernel's failures: a status with a line of text, or the end of the process that measured it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from layerzero_runtime.serving.recovery import is_out_of_memory, is_sticky
from layerzero_tune.measure.contest import JobOutcome
from layerzero_tune.measure.cuda_clock import CaptureError
from layerzero_tune.results.measurement import Status

Result = TypeVar("Result")


class SpoiledProcessError(Exception):
    """A candidate has left this process in a state in which it can measure nothing more."""

    def __init__(self, candidate: int, outcome: JobOutcome) -> None:
        super().__init__(candidate, outcome)
        self.candidate = candidate
        self.outcome = outcome


def attempt(action: Callable[[], Result], otherwise: Status = "failed") -> Result | JobOutcome:
    """What the action gives, or the outcome that its exception stands for: `otherwise`, unless it says more."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a kernel may raise anything; it is recorded as the job's outcome
        return _outcome_of(error, otherwise)


def _outcome_of(error: Exception, otherwise: Status) -> JobOutcome:
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    # A call that no graph can hold leaves the device as it was, although CUDA words it as an error of its own.
    if is_sticky(error) and not isinstance(error, CaptureError):
        return JobOutcome("device_error", message)
    return JobOutcome("out_of_memory" if is_out_of_memory(error) else otherwise, message)
