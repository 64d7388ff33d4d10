"""Contention: the share of the machine that others took, from the processor's own counters."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_tune.measure import bench, contention, contest_run
from layerzero_tune.measure.contention import MAX_ATTEMPTS, ProcessorTime, others_share
from layerzero_tune.measure.processor_speed import ProcessorSpeed
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.main import answer
from layerzero_tune.worker.progress_board import ProgressBoard
from layerzero_tune.worker.protocol import Finished, Request
from tests.tune.contests import contest

_BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


def test_own_work_is_not_others() -> None:
    start = ProcessorTime(busy_s=10.0, own_s=1.0, wall_s=0.0)
    assert others_share(start, ProcessorTime(busy_s=11.0, own_s=2.0, wall_s=1.0)) == 0.0
    assert others_share(start, ProcessorTime(busy_s=None, own_s=2.0, wall_s=1.0)) == 0.0
    assert others_share(start, ProcessorTime(busy_s=12.0, own_s=2.0, wall_s=1.0)) > 0.0


def shares(own_s: float, siblings_s: float, foreign_s: float, processors: int = 16) -> float:
    """The share of others over a second in which so many processor seconds went to these processes."""
    start = ProcessorTime(busy_s=10.0, own_s=1.0, wall_s=0.0, siblings_s=7.0)
    busy_s = own_s + siblings_s + foreign_s
    return others_share(start, ProcessorTime(10.0 + busy_s, 1.0 + own_s, 1.0, 7.0 + siblings_s, processors))


@pytest.mark.parametrize(
    ("siblings_s", "foreign_s", "share"),
    [(0.0, 0.0, 0.0), (3.0, 0.0, 0.0), (7.0, 0.0, 4 / 16), (1.0, 2.0, 2 / 16), (7.0, 2.0, 6 / 16)],
)
def test_siblings_may_take_cores_that_are_free(siblings_s: float, foreign_s: float, share: float) -> None:
    """Up to a quarter of 16 cores with the one that measures, all told."""
    assert shares(1.0, siblings_s, foreign_s) == pytest.approx(share)


def test_who_takes_more_than_the_free_cores_alone_leaves_none_to_siblings() -> None:
    assert shares(1.0, 0.5, 0.0, processors=2) == pytest.approx(0.25)


_SECONDS = st.floats(0.0, 16.0)


@given(_SECONDS, _SECONDS, _SECONDS, st.floats(0.0, 1.0))
def test_siblings_count_for_something_between_nothing_and_foreign_processes(
    own_s: float, siblings_s: float, foreign_s: float, more_s: float
) -> None:
    share = shares(own_s, siblings_s, foreign_s)
    assert shares(own_s, 0.0, foreign_s) - 1e-9 <= share <= shares(own_s, 0.0, foreign_s + siblings_s) + 1e-9
    assert share <= shares(own_s, siblings_s + more_s, foreign_s) + 1e-9


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
    ("usable", "busy_ticks", "processors"),
    [({0}, 700, 1), ({0, 2}, 1300, 2), (None, 1500, 3), ({0, 7}, 1500, 3)],
)
def test_what_others_do_on_other_processors_takes_nothing(
    usable: set[int] | None, busy_ticks: int, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on a host can be kept apart. Where a container's file has other numbers, the whole counts."""
    lines = (
        "cpu  300 300 300 9000 50 200 200 200 0 0",
        *("cpu0 100 100 100 100 10 100 100 200 0 0", "cpu1 100 0 100 4000 20 0 0 0 0 0"),
        *("cpu2 100 200 100 4900 20 100 100 0 0 0", "intr 12345 6 7", "ctxt 8"),
    )
    stat = tmp_path / "stat"
    stat.write_text("\n".join(lines))
    monkeypatch.setattr(contention, "_STAT", str(stat))
    monkeypatch.setattr(contention, "usable_processors", lambda: usable)
    contention._own_names.cache_clear()
    try:
        now = ProcessorTime.now()
    finally:
        contention._own_names.cache_clear()
    assert now.busy_s == pytest.approx(busy_ticks / os.sysconf("SC_CLK_TCK"))
    assert now.processors == processors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/PID/stat")
def test_what_a_run_has_started_are_siblings_down_to_those_that_have_ended() -> None:
    """A process below another one takes a second; then both end."""

    def since(start: ProcessorTime) -> float:
        """Of whole ticks: the difference of two sums in binary fractions of a second lies beside them."""
        return round(ProcessorTime.now(os.getpid()).siblings_s - start.siblings_s, 6)

    second = "end = time.process_time() + 1.0\nwhile time.process_time() < end: pass"
    below = f"import sys, time\n{second}\nsys.stdin.read()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"
    start = ProcessorTime.now(os.getpid())
    with subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60.0
        while ProcessorTime.now(child.pid).siblings_s < 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert since(start) >= 1.0
        child.communicate()
    assert since(start) >= 1.0
    ended = ProcessorTime.now(os.getpid())
    # What this process itself takes is no sibling's.
    exec(second, {"time": time})
    assert since(ended) < 0.5
    assert ProcessorTime.now().siblings_s == 0.0


@pytest.mark.parametrize(("mode", "tuner"), [("eager", 7), ("graph", None)])
def test_the_siblings_of_a_contest_are_asked_for_where_it_leaves_cores(
    mode: str, tuner: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", index=0)
    monkeypatch.setattr(bench, "detect_device", lambda name: gpu if name == "cuda:0" else detect_device(name))
    monkeypatch.setattr(bench, "_gpu_watch", lambda index: None)
    assert bench.Bench.of("cuda:0", mode, 7).tuner == tuner
    assert bench.Bench.of("cpu", "eager", 7).tuner is None


def test_a_contest_beside_siblings_counts_them_where_its_bench_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def now(run: int | None = None) -> ProcessorTime:
        asked.append(run)
        return ProcessorTime(None, 0.0, 0.0)

    here = bench.Bench.of("cpu", "eager")
    beside = replace(here, speed=ProcessorSpeed(lambda: 1.0), tuner=os.getppid())
    monkeypatch.setattr(bench.Bench, "of", lambda *arguments: beside if arguments[2] == os.getppid() else here)
    monkeypatch.setattr(ProcessorTime, "now", now)
    board = ProgressBoard.create()
    reply = answer(Request(contest("torch.rms_norm"), {}), load_kernels(), "cpu", board, math.inf)
    board.close()
    assert isinstance(reply, Finished)
    assert asked == [os.getppid()] * 2


@pytest.mark.parametrize(
    ("found", "attempts"), [([0.01], 1), ([0.5, 0.2, 0.02], 3), ([0.5, 0.4, 0.3, 0.0], MAX_ATTEMPTS)]
)
def test_a_disturbed_contest_is_timed_again(monkeypatch: pytest.MonkeyPatch, found: list[float], attempts: int) -> None:
    seen: list[float] = []

    def share(start: ProcessorTime, end: ProcessorTime) -> float:
        seen.append(found[len(seen)])
        return seen[-1]

    monkeypatch.setattr(contest_run, "others_share", share)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: ProcessorSpeed(lambda: 1.0))
    outcome = contest_run.measure_contest(contest("torch.rms_norm", "torch.rms_norm.fused"), load_kernels())
    assert len(seen) == attempts
    assert outcome.contention == seen[-1]
    assert all(job.status == "ok" and job.screen_ns for job in outcome.outcomes)
    assert len(outcome.outcomes[0].samples_ns) == 4
