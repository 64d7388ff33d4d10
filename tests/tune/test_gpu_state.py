"""The watch over a GPU: what counts as lost speed, what rows keep of its state, and what is said without NVML.

Contests run on the CPU here, beside a stand-in for the driver's library.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.devices import nvml
from layerzero_tune.command_line.run_summary import gpu_summary
from layerzero_tune.measure import contest_run, full_speed, gpu_state
from layerzero_tune.measure.bench import Bench
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.measure.gpu_state import LEAST_LOSS, OWN_LOAD, GpuConditions, GpuState, GpuWatch
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import rows_of
from layerzero_tune.worker.kernels import load_kernels
from tests.tune.contests import BRIEF, contest

H100_UUID = "GPU-4d8a22f6-e8e8-86e5-4b1a-d8fc31360a40"
KERNELS = load_kernels()


@pytest.fixture
def watched_gpu(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> GpuWatch:
    """The watch over a GPU beside which contests are measured."""
    monkeypatch.setattr(nvml, "LIBRARIES", (str(nvml_library),))
    monkeypatch.setattr(gpu_state, "_SLOWER", 1)  # all at every look
    watch = GpuWatch(H100_UUID)

    def watched(device: str, mode: str, tuner: int | None) -> Bench:
        return replace(bench_of(device, mode, tuner), speed=watch, gpu=watch)

    # Whatever else runs on this machine.
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.0)
    bench_of = Bench.of
    monkeypatch.setattr(Bench, "of", watched)
    return watch


def measured(**changes: Any) -> tuple[Contest, ContestOutcome]:
    point = contest("torch.rms_norm", "torch.rms_norm.fused", **changes)
    return point, contest_run.measure_contest(point, KERNELS)


@pytest.mark.parametrize(
    ("state", "lost"),
    [
        (GpuState(), 0.0),
        (GpuState(clock_mhz=345, max_clock_mhz=1980), 0.0),  # idle: nothing holds it down
        (GpuState(clock_mhz=990, max_clock_mhz=1980, slowed=("power cap",)), 0.5),
        (GpuState(clock_mhz=1970, max_clock_mhz=1980, slowed=("power cap",)), LEAST_LOSS),
        (GpuState(slowed=("hardware slowdown",)), LEAST_LOSS),
    ],
)
def test_speed_is_lost_where_power_or_heat_hold_the_clocks_down(state: GpuState, lost: float) -> None:
    assert state.lost == pytest.approx(lost)


def test_without_nvml_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "load_library", lambda: None)
    watch = GpuWatch("GPU-0")
    assert watch.read() == GpuState()
    assert watch.lost() == 0.0


def test_rows_keep_the_state_of_the_gpu_over_the_rounds(watched_gpu: GpuWatch, tmp_path: Path) -> None:
    """The stand-in is found at 1980, 1965 and 1950 MHz in turn, and at the more power the lower its clock is."""
    point, outcome = measured()
    expected = {
        "clock_mhz": 1965.0,
        "lowest_clock_mhz": 1950,
        "memory_clock_mhz": 2619.0,
        "lowest_memory_clock_mhz": 2619,
        "temperature_c": 61.0,
        "highest_temperature_c": 62,
        "power_w": 601.5,
        "highest_power_w": 603.0,
        "slowed": [],
        "core_ns": None,
    }
    rows = rows_of(point, outcome, KERNELS, DeviceSpec(platform="cpu", name="Some CPU"))
    assert [row.gpu for row in rows] == [expected, expected]
    store = ResultsStore(tmp_path)
    store.append(rows)
    read = store.read().rows
    assert [row.gpu for row in read] == [expected, expected]
    assert gpu_summary(read) == {
        "clock_mhz": 1965.0,
        "lowest_clock_mhz": 1950,
        "highest_temperature_c": 62,
        "highest_power_w": 603.0,
        "slowed": {},
    }


def test_a_search_without_rounds_keeps_the_state_too(watched_gpu: GpuWatch) -> None:
    _, outcome = measured(policy=replace(BRIEF, rounds=0))
    assert outcome.gpu is not None
    assert outcome.gpu.memory_clock_mhz == 2619.0


def test_rows_say_why_a_gpu_was_slowed_down_where_it_stays_so(
    watched_gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", "hot")
    monkeypatch.setattr(full_speed, "PATIENCE_S", 0.5)
    point, outcome = measured()
    assert outcome.gpu is not None
    assert outcome.gpu.slowed == ("power cap", "software thermal slowdown")
    assert outcome.contention == LEAST_LOSS
    rows = rows_of(point, outcome, KERNELS, DeviceSpec(platform="cpu", name="Some CPU"))
    assert gpu_summary(rows)["slowed"] == {"power cap": 1, "software thermal slowdown": 1}


def test_what_was_taken_while_the_gpu_was_slowed_down_leaves_nothing_in_the_rows(
    watched_gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hot for three looks after each time that it had cooled: parts are taken again, and the states of the others
    stay."""
    looks = iter(range(1_000_000))
    monkeypatch.setattr(gpu_state, "slowdown_reasons", lambda *_: ("power cap",) if next(looks) % 5 < 3 else ())
    _, outcome = measured()
    assert outcome.gpu is not None
    assert outcome.gpu.slowed == ()
    assert outcome.contention < LEAST_LOSS
    assert next(looks) > 5 * 3


def test_times_count_of_calls_that_hold_the_gpu_at_the_limit_of_its_power(
    watched_gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is timed finds the GPU cool, and leaves it at its limit."""
    looks = iter(range(1_000_000))
    monkeypatch.setattr(gpu_state, "slowdown_reasons", lambda *_: ("power cap",) if next(looks) % 2 else ())
    point, outcome = measured()
    assert outcome.gpu is not None
    assert outcome.gpu.slowed == (OWN_LOAD,)
    assert outcome.contention < LEAST_LOSS
    rows = rows_of(point, outcome, KERNELS, DeviceSpec(platform="cpu", name="Some CPU"))
    assert not any(row.is_slowed for row in rows)
    assert gpu_summary(rows)["slowed"] == {OWN_LOAD: 1}


@pytest.mark.parametrize(
    ("reasons", "period"),
    [(("power cap", "software thermal slowdown"), 2), (("power cap",), 1)],
    ids=["heat, which is no load", "a limit that stays"],
)
def test_what_else_holds_the_gpu_down_is_not_its_own_load(
    watched_gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch, reasons: tuple[str, ...], period: int
) -> None:
    """Of `period` looks the last one finds it slowed down."""
    looks = iter(range(1_000_000))
    monkeypatch.setattr(gpu_state, "slowdown_reasons", lambda *_: reasons if next(looks) % period == period - 1 else ())
    monkeypatch.setattr(full_speed, "PATIENCE_S", 0.5)
    point, outcome = measured()
    assert outcome.gpu is not None
    assert outcome.gpu.slowed == reasons
    assert all(row.is_slowed for row in rows_of(point, outcome, KERNELS, DeviceSpec(platform="cpu", name="Some CPU")))


def test_a_cpu_has_no_such_state() -> None:
    point, outcome = measured()
    assert outcome.gpu is None
    assert gpu_summary(rows_of(point, outcome, KERNELS, DeviceSpec(platform="cpu", name="Some CPU"))) == {}


def test_what_nvml_does_not_say_is_none() -> None:
    states = [GpuState(clock_mhz=1000), GpuState(clock_mhz=1500, slowed=("power cap",)), GpuState(clock_mhz=1400)]
    assert GpuConditions.of(states) == GpuConditions(1400.0, 1000, None, None, None, None, None, None, ("power cap",))


def test_what_changes_slowly_is_read_less_often(watched_gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "_SLOWER", 4)
    states = []
    for _ in range(5):
        watched_gpu.lost()
        states.append(watched_gpu.last)
    assert len({state.clock_mhz for state in states}) > 1
    assert len({state.temperature_c for state in states[:4]}) == 1
    assert states[4].temperature_c != states[3].temperature_c
