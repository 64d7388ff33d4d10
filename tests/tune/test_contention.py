"""Contention: the share of the machine that others took, from the processor's own counters."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from layerzero_tune.measure import cpu
from layerzero_tune.measure.contention import MAX_ATTEMPTS, ProcessorTime, others_share
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

    monkeypatch.setattr(cpu, "others_share", share)
    monkeypatch.setattr(cpu, "_machine_speed", lambda: ParallelSpeed(lambda: 1.0))
    outcome = cpu.measure_contest(contest("torch.rms_norm", "torch.rms_norm.fused"), load_kernels())
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


def test_a_contest_waits_for_the_speed_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 10.0, 10.0, 8.0, 8.0])
    machine.speed.lost()
    monkeypatch.setattr(cpu, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(cpu, "_machine_speed", lambda: machine.speed)
    outcome = cpu.measure_contest(contest("torch.rms_norm"), load_kernels())
    assert machine.times == []
    assert outcome.contention == 0.0


def test_a_contest_during_which_the_speed_was_lost_is_timed_again_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, *([8.0, 10.0] * MAX_ATTEMPTS)])
    machine.speed.lost()
    monkeypatch.setattr(cpu, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(cpu, "_machine_speed", lambda: machine.speed)
    outcome = cpu.measure_contest(contest("torch.rms_norm"), load_kernels())
    assert machine.times == []
    assert outcome.contention == pytest.approx(0.2)


def test_nobody_waits_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 10.0, 10.0])
    machine.speed.lost()
    monkeypatch.setattr(cpu, "others_share", lambda start, end: 0.5)
    monkeypatch.setattr(cpu, "_machine_speed", lambda: machine.speed)
    outcome = cpu.measure_contest(contest("torch.rms_norm"), load_kernels())
    assert machine.times == []
    assert outcome.contention == 0.5


def test_the_loop_takes_a_time() -> None:
    assert 100.0 < parallel_loop()() < 1e7
