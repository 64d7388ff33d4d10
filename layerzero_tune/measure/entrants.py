"""The candidates of a contest that is being measured: each drops out as soon as it gets an outcome without a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from layerzero_runtime.kernel import KernelFunction
from layerzero_tune.measure.contest import JobOutcome
from layerzero_tune.measure.failures import Result, SpoiledProcessError, attempt
from layerzero_tune.measure.kept_memory import KeptMemory
from layerzero_tune.results.measurement import Status

Progress = Callable[[int | None, str], None]
"""Called before each step with the candidate's index (None: the contest's own) and the step's name."""


class Entrants:
    """Candidates by index.

    Attributes:
        outcomes: of all that have one; those that are still in may have the one of their check.
        functions: of those that are still in.
        memory: what their calls have kept.

    Args:
        settled: outcomes that are known before anything is measured.
        memory: that of this contest.
        progress: is told of every step.
    """

    def __init__(self, settled: Mapping[int, JobOutcome], memory: KeptMemory, progress: Progress) -> None:
        self.outcomes: dict[int, JobOutcome] = dict(settled)
        self.functions: dict[int, KernelFunction] = {}
        self.memory = memory
        self._progress = progress

    def attempt(self, index: int, action: Callable[[], Result], otherwise: Status = "failed") -> Result | None:
        """What the candidate's action gives; None, and an outcome for the candidate, where it raises.

        Raises:
            SpoiledProcessError: the process is of no use any more.
        """
        result = attempt(action, otherwise)
        self._progress(None, "between steps")  # what follows takes none of the candidate's time
        leak = self.memory.excess(index)
        if leak:
            raise SpoiledProcessError(index, JobOutcome("out_of_memory", leak))
        if not isinstance(result, JobOutcome):
            return result
        if result.status == "device_error":
            raise SpoiledProcessError(index, result)
        self.outcomes[index] = result
        self.functions.pop(index, None)
        return None

    def step(self, index: int, name: str, action: Callable[[], Result]) -> Result | None:
        """What one step of a candidate gives; None where it fails now, which takes it out, or did before.

        Raises:
            SpoiledProcessError: as for `attempt`.
        """
        if index not in self.functions:
            return None
        self._progress(index, name)
        return self.attempt(index, partial(self.memory.count, index, action))
