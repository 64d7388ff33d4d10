"""The watch over a GPU: what counts as lost speed, and what is said without NVML."""

from __future__ import annotations

import pytest

from layerzero_tune.measure import gpu_state
from layerzero_tune.measure.gpu_state import LEAST_LOSS, GpuState, GpuWatch


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
