"""What waits for compilers rests, and what these do not disturb is measured meanwhile."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search import tuning
from layerzero_tune.search.budget import Deadline
from tests.tune.clocked_device import ClockedDevice, run
from tests.tune.configured_kernels import PASSES
from tests.tune.synthetic_results import norm
from tests.tune.tuning_runs import run_at

DEFAULT = "torch.rms_norm"
GRAPHS = [replace(norm(2**power), mode="graph") for power in range(14)]
POINTS = [norm(8), norm(128), norm(4096), *GRAPHS]


class Compiling(ClockedDevice):
    """The configurations of a search's step are compiled while two contests are measured.

    Attributes:
        waits: the places in the run of the steps that began before.
    """

    def __init__(self) -> None:
        super().__init__([DEFAULT, PASSES.kernel_id])
        self.waits: list[int] = []
        self._begun: dict[str, int] = {}

    def is_compiling(self, contest: Contest) -> bool:
        return contest.is_search and self.clock < self._begun.setdefault(contest.contest_id, self.clock) + 2

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        if self.is_compiling(contest):
            self.waits.append(self.clock)
        return super().measure(contest)


def _is_of(step: Contest, other: Contest) -> bool:
    """Whether both are of one search."""
    return step.is_search and step.context == other.context


def test_what_compilers_do_not_disturb_is_measured_while_a_search_waits_for_them(tmp_path: Path) -> None:
    device = Compiling()
    measured = run(device, ResultsStore(tmp_path / "resting"), *POINTS)
    at_once = run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path / "at once"), *POINTS)
    assert {contest.contest_id for contest in measured} == {contest.contest_id for contest in at_once}
    between = []
    for place, contest in enumerate(measured):
        following = next((i for i in range(place + 1, len(measured)) if _is_of(measured[i], contest)), place)
        if contest.is_search:
            between += [other for other in measured[place + 1 : following] if not other.is_search]
    assert between
    # Eager calls have the host's time in them: compilers stand still beside them, and no search would get on. So these
    # come between only at points that were never measured, and where what is left of the others hardly tells more.
    disturbing = [contest for contest in between if contest.context.mode != "graph"]
    assert len(disturbing) < len(between) / 2
    for eager in disturbing:
        place = measured.index(eager)
        assert all(contest.context != eager.context for contest in measured[:place])


def test_a_search_waits_only_where_nothing_else_is_left(tmp_path: Path) -> None:
    device = Compiling()
    measured = run(device, ResultsStore(tmp_path), *POINTS)
    points = [next(i for i, contest in enumerate(measured) if contest.context == context) for context in GRAPHS]
    assert device.waits
    assert min(device.waits) > max(points)


def test_a_device_that_compiles_nothing_ahead_goes_on_with_a_search_at_once(tmp_path: Path) -> None:
    measured = run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path), *POINTS)
    searched = [contest.context for contest in measured if contest.is_search]
    runs = [context for place, context in enumerate(searched) if place == 0 or searched[place - 1] != context]
    assert len(runs) == len(set(runs))


class CompilingPoints(ClockedDevice):
    """What some points need is compiled while so many contests are measured."""

    def __init__(self, contexts: Collection[SelectionContext], contests: float) -> None:
        super().__init__([DEFAULT, "torch.rms_norm.fused"])
        self._contexts, self._contests = contexts, contests

    def is_compiling(self, contest: Contest) -> bool:
        return contest.context in self._contexts and self.clock < self._contests


def test_points_rest_as_well_and_are_measured_as_soon_as_they_can(tmp_path: Path) -> None:
    resting = GRAPHS[:3]
    measured = run(CompilingPoints(resting, 6), ResultsStore(tmp_path), *GRAPHS)
    assert {contest.context for contest in measured} == set(GRAPHS)
    assert next(place for place, contest in enumerate(measured) if contest.context in resting) == 6


def test_where_all_points_rest_one_waits_for_its_compilers(tmp_path: Path) -> None:
    measured = run(CompilingPoints(GRAPHS, math.inf), ResultsStore(tmp_path), *GRAPHS)
    assert {contest.context for contest in measured} == set(GRAPHS)


def test_not_all_points_rest_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MOST_RESTING", 3)
    measured = run(CompilingPoints(GRAPHS[4:], math.inf), ResultsStore(tmp_path), *GRAPHS)
    compiled = [place for place, contest in enumerate(measured) if contest.context in GRAPHS[:4]]
    assert {contest.context for contest in measured} == set(GRAPHS)
    # The most valuable points are the bounds.
    assert max(compiled) > 3


def test_what_rests_when_the_time_is_over_is_named_as_skipped(tmp_path: Path) -> None:
    device = CompilingPoints(GRAPHS[:3], math.inf)
    end = run_at(device, GRAPHS, tmp_path, deadline=Deadline.after(0.0))
    assert {planned.contest.context for planned in end.skipped} == set(GRAPHS)


def test_nothing_that_rests_begins_after_the_time_is_over(tmp_path: Path) -> None:
    """The deadline comes while the last contest before it is measured."""
    now = 0.0

    class Timed(CompilingPoints):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            nonlocal now
            now += 1e3
            return super().measure(contest)

    class Passing(Deadline):
        def left_s(self) -> float:
            return self.at - now

    device = Timed(GRAPHS[:3], math.inf)
    end = run_at(device, GRAPHS, tmp_path, deadline=Passing(4.5e3))
    assert {planned.contest.context for planned in end.skipped} > set(GRAPHS[:3])
