"""A contest that leaves a doubt is measured again at the end of the run, and no more often than is of use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_tune.compile.distrust import disturbed_points
from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import MAX_TAKES, Held, LiveDevice
from layerzero_tune.search.doubt import leaves_doubt
from layerzero_tune.search.jobs import contest_of_rows
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.search.tuning import FinishedContest
from tests.tune.synthetic_results import DEVICE, Times, contest_rows, norm
from tests.tune.tuning_runs import Seen, agenda_at, planned_at, run_at

Taken = list[tuple[int | None, int]]
POINTS = tuple(norm(rows) for rows in (1, 2, 3))
TIMES = {"torch.rms_norm": 1000.0, "synthetic.lean": 900.0}


class SharedDevice:
    """A device beside whose first contests at a point, by its rows, other processes run."""

    spec: DeviceSpec = DEVICE

    def __init__(self, disturbed: Mapping[int, int], times: Times = TIMES) -> None:
        self.disturbed = disturbed
        self.times = times
        self.taken: Taken = []
        self.offered: tuple[Contest, ...] = ()

    searches = None

    def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
        return self.offered or RecordedDevice(contest_rows(context, self.times)).contests(context)

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        context = contest.context
        self.taken.append((context.rows, contest.repeat))
        share = 2 * MAX_SHARE if contest.repeat < self.disturbed.get(context.rows or 0, 0) else 0.0
        rows = contest_rows(context, self.times, repeat=contest.repeat)
        return tuple(replace(row, contention=share) for row in rows), ContestOutcome((), rows[0].measured_at)

    again = LiveDevice.again
    current = RecordedDevice.current
    expect = RecordedDevice.expect
    is_compiling = RecordedDevice.is_compiling

    def recalled(self, rows: Sequence[Measurement]) -> Contest | None:
        return contest_of_rows(rows)


def run(device: SharedDevice, folder: Path, points: tuple[SelectionContext, ...] = POINTS) -> list[FinishedContest]:
    seen = Seen()
    run_at(device, points, folder, seen)
    return seen.finished_contests


def test_disturbed_contests_come_again_after_all_others(tmp_path: Path) -> None:
    device = SharedDevice({1: 1, 2: 2})
    seen = run(device, tmp_path)
    assert sorted(device.taken[:3]) == [(1, 0), (2, 0), (3, 0)]
    assert sorted(device.taken[3:]) == [(1, 1), (2, 1), (2, 2)]
    assert [finished.planned.kind for finished in seen] == ["point"] * 3 + ["repeat"] * 3
    assert seen[-1].left == 0
    assert disturbed_points(ResultsStore(tmp_path).read().rows) == frozenset()
    run(device, tmp_path)
    assert len(device.taken) == 6


def test_where_the_neighbour_stays_the_run_ends_all_the_same(tmp_path: Path) -> None:
    device = SharedDevice({2: 99})
    run(device, tmp_path)
    assert sorted(device.taken[:3]) == [(1, 0), (2, 0), (3, 0)]
    assert device.taken[3:] == [(2, repeat) for repeat in range(1, MAX_TAKES)]
    assert disturbed_points(ResultsStore(tmp_path).read().rows) == {norm(2)}
    run(device, tmp_path)
    assert len(device.taken) == 2 + MAX_TAKES


@pytest.mark.parametrize("takes", [1, 2])
def test_a_run_that_was_cut_continues_with_what_it_owed(tmp_path: Path, takes: int) -> None:
    device = SharedDevice({1: 2})
    store = ResultsStore(tmp_path)
    for contest in device.contests(norm(1)):
        for repeat in range(takes):
            rows, _ = device.measure(replace(contest, repeat=repeat))
            store.append(rows)
    plan = planned_at(device, POINTS, store)
    assert (plan.found, len(plan.missing)) == (1, 2)
    device.taken.clear()
    run(device, tmp_path)
    assert sorted(device.taken) == sorted([(2, 0), (3, 0), *((1, repeat) for repeat in range(takes, 3))])


def test_a_contest_without_any_time_is_not_taken_again(tmp_path: Path) -> None:
    device = SharedDevice({})
    rows = contest_rows(norm(1), {"torch.rms_norm": "failed"})
    store = ResultsStore(tmp_path)
    store.append([replace(row, contention=1.0) for row in rows])
    assert planned_at(device, POINTS[1:], store).found == 0
    (contest,) = RecordedDevice(rows).contests(norm(1))
    offering = SharedDevice({})
    offering.offered = (contest,)
    assert agenda_at(offering, POINTS[:1], store).next() is None


def test_a_recorded_device_has_nothing_else_to_offer(tmp_path: Path) -> None:
    rows = [replace(row, contention=1.0) for row in contest_rows(norm(1), TIMES)]
    device, store = RecordedDevice(rows), ResultsStore(tmp_path)
    run_at(device, device.contexts, tmp_path)
    assert len(store.contest_ids()) == 1
    assert agenda_at(device, device.contexts, store).next() is None


@pytest.mark.parametrize(("rival", "takes"), [(930.0, MAX_TAKES), (860.0, MAX_TAKES), (1000.0, 1), (830.0, 1)])
def test_a_close_verdict_is_looked_at_again(tmp_path: Path, rival: float, takes: int) -> None:
    device = SharedDevice({}, TIMES | {"synthetic.wide": rival})
    run(device, tmp_path, POINTS[:1])
    assert device.taken == [(1, repeat) for repeat in range(takes)]
    run(device, tmp_path, POINTS[:1])
    assert len(device.taken) == takes


def test_a_gain_on_the_default_that_is_small_is_looked_at_again(tmp_path: Path) -> None:
    device = SharedDevice({}, {"torch.rms_norm": 1000.0, "synthetic.lean": 970.0})
    run(device, tmp_path, POINTS[:1])
    assert len(device.taken) == MAX_TAKES


def test_what_was_only_screened_is_no_rival() -> None:
    rows = contest_rows(norm(1), TIMES | {"synthetic.wide": 930.0}, screened=["synthetic.wide"])
    assert not leaves_doubt(rows)


def test_a_second_contest_may_settle_the_doubt(tmp_path: Path) -> None:
    first = contest_rows(norm(1), TIMES | {"synthetic.wide": 930.0})
    second = contest_rows(norm(1), TIMES | {"synthetic.wide": 990.0}, repeat=1)
    assert leaves_doubt(first)
    assert not leaves_doubt([*first, *second])


def test_a_point_whose_gpu_was_slowed_down_counts_as_not_measured(tmp_path: Path) -> None:
    class Slowed(SharedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            slowed = {"slowed": ["power cap"] if contest.repeat == 0 and contest.context.rows == 2 else []}
            return tuple(replace(row, gpu=slowed) for row in rows), outcome

    device = Slowed({})
    seen = run(device, tmp_path)
    assert sorted(device.taken) == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert seen[-1].planned.kind == "repeat"
    assert seen[-1].planned.regret > 0.0
