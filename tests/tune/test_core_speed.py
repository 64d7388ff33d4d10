"""The speed of the core that makes a GPU's calls: who measures moves to a core that has it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_tune.measure import bench, contest_run, core_speed, full_speed, processor_speed
from layerzero_tune.measure.contest import ContestOutcome
from layerzero_tune.measure.core_speed import CoreSpeed, CoreWatch, serial_loop
from layerzero_tune.measure.full_speed import PATIENCE_S, FullSpeed, Patience
from layerzero_tune.measure.gpu_state import GpuWatch
from layerzero_tune.measure.processor_speed import ProcessorSpeed
from layerzero_tune.worker.kernels import load_kernels
from tests.tune.contests import contest


class Host:
    """A machine on each core of which the loop takes so many ms; the thread stays where it was put last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> None:
        self.times = times
        self.allowed = set(times)
        self.core = min(times)
        self.now = 0.0
        self.been: list[int] = []
        monkeypatch.setattr(os, "getpid", lambda: 0)
        monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(self.allowed))
        monkeypatch.setattr(os, "sched_setaffinity", self.put)

    def put(self, thread: int, cores: Iterable[int]) -> None:
        self.allowed = set(cores)
        if self.core not in self.allowed:
            self.core = min(self.allowed)
        self.been.append(self.core)

    def take(self) -> float:
        self.now += self.times[self.core] * 1e-3
        return self.times[self.core]

    def speed(self) -> CoreSpeed:
        return CoreSpeed(self.take, lambda: self.now)


def taken_on(host: Host, speed: FullSpeed) -> list[int]:
    """The cores on which a part was taken until one was kept."""
    cores: list[int] = []

    def part() -> float:
        cores.append(host.core)
        return 1.0

    assert speed.take(part) == 1.0
    return cores


def full(host: Host, patience: Patience | None = None) -> FullSpeed:
    return FullSpeed(host.speed(), lambda: None, patience or Patience())


def test_what_was_measured_on_a_slow_core_is_measured_again_on_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.3, 1: 0.3, 2: 0.2, 3: 0.3})
    speed = full(host)
    assert taken_on(host, speed) == [3, 2]
    assert speed.lost == 0.0
    assert host.allowed == {0, 1, 2, 3}
    assert taken_on(host, speed) == [2]


def test_a_neighbour_that_comes_is_fled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: 0.2, 2: 0.2})
    speed = full(host)
    start = host.core
    assert taken_on(host, speed) == [start]
    host.times[start] = 0.3
    assert taken_on(host, speed) == [start, (start + 1) % 3]


def test_where_no_core_has_the_speed_the_contest_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: 0.2})
    patience = Patience()
    speed = full(host, patience)
    host.times |= {0: 0.3, 1: 0.3}
    began = host.now
    assert len(taken_on(host, speed)) == 2
    assert host.now - began == pytest.approx(PATIENCE_S, rel=0.3)
    assert speed.lost == pytest.approx(1 / 3)
    assert patience.seconds == PATIENCE_S / 2
    assert len(taken_on(host, speed)) == 1


@pytest.mark.parametrize(("time", "taken"), [(0.24, 1), (0.26, 2)])
def test_a_fifth_may_be_missing(monkeypatch: pytest.MonkeyPatch, time: float, taken: int) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: time})
    assert len(taken_on(host, full(host))) == taken


def test_what_has_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: 0.3})
    watch = CoreWatch(host.speed(), lambda: None)
    began = host.now
    assert watch.take(1.0, lambda: None) is None
    assert (host.now, watch.seen_ns) == (began, [])


def test_a_part_that_is_taken_again_counts_as_it_was_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_PATIENCE", "0")
    host = Host(monkeypatch, {0: 0.2, 1: 0.3})
    watch = CoreWatch(host.speed(), lambda: None)
    part = watch.part(lambda: watch.take(1.0, lambda: 5.0))
    part()
    host.core = 0
    part()
    watch.keep_part()
    assert (watch.lost, watch.seen_ns) == (0.0, [0.2])
    host.core = 1
    part()
    watch.keep_part()
    assert watch.lost == pytest.approx(1 / 3)
    assert watch.seen_ns == [0.2, 0.3]


def test_a_contest_that_waited_in_vain_makes_the_next_one_wait_half_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: 0.2})
    speed = host.speed()
    host.times |= {0: 0.3, 1: 0.3}
    for share in (1.0, 0.5, 0.25):
        began = host.now
        CoreWatch(speed, lambda: None).take(1.0, lambda: 5.0)
        assert host.now - began == pytest.approx(PATIENCE_S * share, rel=0.3)


def test_waiting_for_a_core_costs_no_patience_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in which a core was waited for all the time, and the GPU lost its speed once."""
    clock, waited, times = [0.0], [0.0], [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    monkeypatch.setattr(full_speed, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(processor_speed, "sleep", lambda seconds: None)
    gpu = ProcessorSpeed(lambda: times.pop(0))
    gpu.lost()
    speed = FullSpeed(gpu, lambda: None, Patience(), lambda: waited[0])
    taken = []

    def round_() -> int:
        clock[0] += PATIENCE_S
        waited[0] += PATIENCE_S
        taken.append(clock[0])
        return len(taken)

    assert speed.take(round_) == 3
    assert speed.lost == 0.0


def test_a_thread_is_left_on_the_only_core_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, {0: 0.2, 1: 0.3})
    speed = host.speed()
    host.put(0, {1})
    host.been.clear()
    speed.pause()
    speed.pause()
    assert (host.allowed, host.core) == ({1}, 1)
    assert set(host.been) == {1}


def test_this_machine_has_a_speed_and_its_cores_are_left_as_they_were() -> None:
    before = os.sched_getaffinity(0)
    loop = serial_loop()
    assert 100.0 < loop() < 1e6
    assert not torch.is_inference_mode_enabled()
    speed = CoreSpeed(loop)
    assert 0.0 <= speed.lost() < 1.0
    assert not speed.is_of_load()
    assert os.sched_getaffinity(0) == before


def test_the_loop_takes_the_same_time_wherever_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contests run under inference_mode, the first looks do not."""
    modes: set[bool] = set()
    monkeypatch.setattr(torch, "add", lambda *_, out: modes.add(torch.is_inference_mode_enabled()))
    serial_loop()()
    with torch.inference_mode():
        serial_loop()()
    assert modes == {True}


@pytest.mark.parametrize(("mode", "watched"), [("eager", True), ("graph", False)])
def test_calls_that_the_host_makes_one_by_one_are_watched(
    mode: str, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", index=0)
    monkeypatch.setattr(bench, "detect_device", lambda name: gpu if name == "cuda:0" else detect_device(name))
    monkeypatch.setattr(bench, "_gpu_watch", lambda index: None)
    assert (bench.Bench.of("cuda:0", mode).core is not None) == watched
    assert bench.Bench.of("cpu", "eager").core is None


def measured_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> tuple[ContestOutcome, list[str]]:
    """A contest whose calls a core of the host makes, and its steps."""
    cpu, idle = bench.Bench.of("cpu", "eager"), ProcessorSpeed(lambda: 1.0)
    here = replace(cpu, speed=idle, gpu=GpuWatch("GPU-0"), core=host.speed())
    monkeypatch.setattr(bench.Bench, "of", lambda *arguments: here)
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    steps: list[str] = []
    outcome = contest_run.measure_contest(
        contest("torch.rms_norm"), load_kernels(), progress=lambda candidate, step: steps.append(step)
    )
    return outcome, steps


def test_every_sample_of_short_calls_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    lost = CoreSpeed.lost

    def look(speed: CoreSpeed) -> float:
        looks.append(lost(speed))
        return looks[-1]

    monkeypatch.setattr(CoreSpeed, "lost", look)
    host = Host(monkeypatch, {0: 0.2, 1: 0.3})
    outcome, steps = measured_on(host, monkeypatch)
    assert host.core == 0
    assert outcome.contention == 0.0
    assert len(outcome.outcomes[0].samples_ns) == 4
    # A look behind each, two at both cores before, and two while the first screening, on core 1, waits.
    assert steps.count("waiting for the machine") == 1
    assert steps.count("screening") > 2
    assert [steps.count(f"round {number}") for number in range(1, 5)] == [1] * 4
    assert len(looks) == 2 + steps.count("screening") + 4 + 2
    assert outcome.gpu is not None
    assert outcome.gpu.core_ns == 0.2


def test_a_contest_says_which_speed_of_a_core_it_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_PATIENCE", "0")
    assert measured_on(Host(monkeypatch, {0: 0.2, 1: 0.3}), monkeypatch)[0].contention == pytest.approx(1 / 3)


def test_long_calls_are_the_same_on_any_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_PATIENCE", "0")
    monkeypatch.setattr(core_speed, "HOST_BOUND_NS", 1.0)
    outcome, steps = measured_on(Host(monkeypatch, {0: 0.2, 1: 0.3}), monkeypatch)
    assert outcome.contention == 0.0
    assert "waiting for the machine" not in steps
    assert outcome.gpu is not None
    assert outcome.gpu.core_ns is None
