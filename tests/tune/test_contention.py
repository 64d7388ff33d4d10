"""Contention: the share of the machine that others took, from the processor's own counters."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from layerzero_tune.measure import cpu
from layerzero_tune.measure.contention import MAX_ATTEMPTS, ProcessorTime, others_share
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
    outcome = cpu.measure_contest(contest("torch.rms_norm", "torch.rms_norm.fused"), load_kernels())
    assert len(seen) == attempts
    assert outcome.contention == seen[-1]
    assert all(job.status == "ok" and job.screen_ns for job in outcome.outcomes)
    assert len(outcome.outcomes[0].samples_ns) == 4
