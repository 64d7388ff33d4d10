"""A device whose times follow from configurations: 4 passes in tiles of 64 in the first order are best by far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_tune.evaluate.public_calls import KERNELS as PUBLIC
from layerzero_tune.measure.contest import Candidate, Contest, ContestOutcome, JobOutcome, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.searches import Searches
from layerzero_tune.search.device import LiveDevice, rows_of
from layerzero_tune.worker.process import WorkerProcess
from tests.tune.configured_kernels import MANY, OWN_PASSES, PASSES
from tests.tune.synthetic_results import DEVICE
from tests.tune.tuning_runs import Seen, run_at

POLICY = MeasurementPolicy()
SEARCH = SearchPolicy(measurements=40, near_measurements=16)
KERNELS = (*builtin_kernels(), *PUBLIC, PASSES, MANY)

Cost = Callable[[Configuration], float]


_ORDERS = ("rows", "columns", "a", "b", "c", "d")


def cost(configuration: Configuration) -> float:
    passes, tile = configuration.get("passes", OWN_PASSES), configuration.get("tile", 64)
    order = _ORDERS.index(configuration["order"]) / 2 if configuration.get("order") in _ORDERS else 0.0
    return 1.0 + float(abs(passes - 4)) + abs(math.log2(tile / 64)) + order


class ClockedDevice(LiveDevice):
    """A live device whose times come from a function in place of a clock."""

    def __init__(self, kernels: Sequence[str], cost: Cost = cost) -> None:
        registry = Registry(kernel for kernel in KERNELS if kernel.kernel_id in kernels)
        super().__init__(DEVICE, registry, POLICY, WorkerProcess(), SEARCH)
        self.by_id = {kernel.kernel_id: kernel for kernel in registry}
        self.cost = cost
        self.clock = 0

    def time(self, candidate: Candidate) -> float:
        """Of a call, in us."""
        return self.cost(candidate.configuration)

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        self.clock += 1
        outcomes = tuple(
            JobOutcome("failed", "does not compile")
            if candidate.configuration.get("order") == "broken"
            else JobOutcome("ok", screen_ns=(time := 1e3 * self.time(candidate)), samples_ns=(time,) * rounds)
            for candidate in contest.candidates
            for rounds in [contest.policy.rounds]
        )
        ended = f"2026-03-01T{self.clock // 3600:02}:{self.clock // 60 % 60:02}:{self.clock % 60:02}+00:00"
        outcome = ContestOutcome(outcomes, ended)
        return rows_of(contest, outcome, self.by_id, DEVICE), outcome


def run(device: ClockedDevice, store: ResultsStore, *contexts: SelectionContext) -> list[Contest]:
    """The contests that a run measures."""
    seen = Seen()
    run_at(device, contexts, store.directory, seen)
    return [finished.contest for finished in seen.finished_contests]


def searches_of(device: ClockedDevice) -> Searches:
    assert device.searches is not None
    return device.searches


def first_step(
    device: ClockedDevice, context: SelectionContext, kernel_id: str, searched: Searched | None = None
) -> Contest:
    """The next contest of a kernel's search at the point."""
    step = searches_of(device).step(context, kernel_id, searched or Searched())
    assert step is not None
    return step.contest
