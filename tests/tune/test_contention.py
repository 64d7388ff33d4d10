"""Contention: the share of the machine that others took, from the processor's own counters."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from layerzero_tune.measure import bench, contest_run, full_speed
from layerzero_tune.measure.contention import MAX_ATTEMPTS, ProcessorTime, others_share
from layerzero_tune.measure.full_speed import PATIENCE_S, FullSpeed
from layerzero_tune.measure.parallel_speed import WINDOW_S, ParallelSpeed, parallel_loop
from layerzero_tune.worker.kernels import load_kernels
from tests.tune.contests import contest

_BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


def test_own_work_is_not_others() -> None:
    start = ProcessorTime(machine_s=10.0, own_s=1.0, wall_s=0.0)
    assert others_share(start, ProcessorTime(machine_s=11.0, own_s=2.0, wall_s=1.0)) == 0.0
    assert others_share(start, ProcessorTime(machine_s=None, own_s=2.0, wall_s=1.0)) == 0.0
    assert others_share(start, ProcessorTime(machine_s=12.0, own_s=2.0, wall_s=1.0)) > 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_a_busy_neighbour_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as neighbour:
        time.sleep(0.3)
        start = ProcessorTime.now()
        time.sleep(0.5)
        share = others_share(start, ProcessorTime.now())
        neighbour.kill()
    assert share > 0.1


@pytest.mark.parametrize(
    ("shares", "attempts"), [([0.01], 1), ([0.5, 0.2, 0.02], 3), ([0.5, 0.4, 0.3, 0.0], MAX_ATTEMPTS)]
)
def test_a_disturbed_contest_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], attempts: int
) -> None:
    seen: list[float] = []

    def share(start: ProcessorTime, end: ProcessorTime) -> float:
        seen.append(shares[len(seen)])
        return seen[-1]

    monkeypatch.setattr(contest_run, "others_share", share)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: ParallelSpeed(lambda: 1.0))
    outcome = contest_run.measure_contest(contest("torch.rms_norm", "torch.rms_norm.fused"), load_kernels())
    assert len(seen) == attempts
    assert outcome.contention == seen[-1]
    assert all(job.status == "ok" and job.screen_ns for job in outcome.outcomes)
    assert len(outcome.outcomes[0].samples_ns) == 4


class Machine:
    """A machine whose parallel loop takes these times, looked at once a second."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)
        self.now = 0.0
        self.speed = ParallelSpeed(self.take, lambda: self.now)

    def take(self) -> float:
        self.now += 1.0
        return self.times.pop(0)


def test_lost_speed_is_against_the_best_that_was_seen() -> None:
    machine = Machine([10.0, 8.0, 10.0, 8.0, 16.0])
    assert [machine.speed.lost() for _ in range(5)] == pytest.approx([0.0, 0.0, 0.2, 0.0, 0.5])


def test_a_speed_that_stays_is_the_machines_own() -> None:
    machine = Machine([8.0] + [10.0] * 2 * int(WINDOW_S))
    lost = [machine.speed.lost() for _ in range(int(WINDOW_S) + 3)]
    assert lost[1] == lost[int(WINDOW_S) - 1] == pytest.approx(0.2)
    assert lost[-1] == 0.0


def parts_of(machine: Machine, count: int) -> tuple[list[int], FullSpeed]:
    """How often each of so many parts of a contest was taken, on a machine whose best speed is known."""
    machine.speed.lost()
    taken = [0] * count
    speed = FullSpeed(machine.speed, lambda: None)
    speed.wait()
    for part in range(count):

        def take(part: int = part) -> int:
            taken[part] += 1
            return part

        assert speed.take(take) == part
    assert machine.times == []
    return taken, speed


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(full_speed, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("quiet")
def test_a_contest_waits_for_the_speed_of_the_machine() -> None:
    taken, speed = parts_of(Machine([8.0, 10.0, 10.0, 8.0, 8.0, 8.0]), 2)
    assert taken == [1, 1]
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
def test_a_part_during_which_the_speed_was_lost_is_taken_again() -> None:
    taken, speed = parts_of(Machine([8.0, 8.0, 8.0, 10.0, 10.0, 8.0, 8.0, 8.0]), 3)
    assert taken == [1, 2, 1]
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
def test_where_the_speed_stays_away_the_contest_goes_on_and_says_so() -> None:
    looks = int(PATIENCE_S / 0.25)
    taken, speed = parts_of(Machine([8.0, *[10.0] * looks, 10.0, 16.0, 8.0]), 3)
    assert taken == [1, 1, 1]
    assert speed.lost == pytest.approx(0.5)


@pytest.mark.usefixtures("quiet")
def test_a_part_is_not_taken_again_for_ever() -> None:
    parts = int(PATIENCE_S / 0.25)
    machine = Machine([8.0, 8.0, *[10.0, 8.0] * (parts - 1), 10.0, 10.0, 8.0])
    taken, speed = parts_of(machine, 2)
    assert taken == [parts + 1, 1]
    assert speed.lost == pytest.approx(0.2)


def test_nobody_waits_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.5)
    taken, speed = parts_of(Machine([8.0, 10.0, 10.0]), 1)
    assert taken == [1]
    assert speed.lost == pytest.approx(0.2)


@pytest.mark.usefixtures("quiet")
def test_the_screening_and_every_round_of_a_contest_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 8.0, 10.0, 8.0, 8.0, 8.0, 10.0, 8.0, 8.0, 8.0, 8.0])
    machine.speed.lost()
    steps: list[str] = []
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: machine.speed)
    outcome = contest_run.measure_contest(
        contest("torch.rms_norm"), load_kernels(), progress=lambda candidate, step: steps.append(step)
    )
    assert machine.times == []
    assert outcome.contention == 0.0
    (job,) = outcome.outcomes
    assert len(job.samples_ns) == 4
    assert steps.count("round 1") == 1
    assert steps.count("round 2") == 2
    screenings = steps.count("screening")
    assert screenings
    assert screenings % 2 == 0


def test_a_contest_says_which_speed_it_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, *[10.0] * 7])
    machine.speed.lost()
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.5)
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: machine.speed)
    assert contest_run.measure_contest(contest("torch.rms_norm"), load_kernels()).contention == pytest.approx(0.2)


def test_the_loop_takes_a_time() -> None:
    assert 100.0 < parallel_loop()() < 1e7
