"""Contests on a CUDA device: both clocks, calls that no graph can hold, and the state of the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.measure.contest_run import measure_contest
from layerzero_tune.measure.gpu_state import GpuWatch
from tests.tune.contests import contest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KERNELS = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
SMALL = SelectionContext(operation="norm.rms", dtype="bfloat16", rows=16, hidden_size=1024)
LARGE = replace(SMALL, rows=16384, hidden_size=8192)
BRIEF = MeasurementPolicy(warmup_ms=2.0, screen_ms=2.0, round_ms=2.0, rounds=4)
NAMES = ("torch.rms_norm", "triton.rms_norm")


def medians(context: SelectionContext) -> list[float]:
    outcome = measure_contest(contest(*NAMES, context=context, policy=BRIEF), KERNELS, device="cuda:0")
    assert [job.status for job in outcome.outcomes] == ["ok", "ok"]
    assert len(outcome.outcomes[0].samples_ns) == 4
    return [job.screen_ns or 0.0 for job in outcome.outcomes]


def test_a_graph_has_no_launch_cost_and_a_large_call_hides_it() -> None:
    for eager, graph in zip(medians(SMALL), medians(replace(SMALL, mode="graph")), strict=True):
        assert graph < 0.8 * eager
    # Each sample of a few calls ends with a synchronisation, which eager time has in it.
    assert medians(replace(LARGE, mode="graph")) == pytest.approx(medians(LARGE), rel=0.25)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_no_call_is_faster_than_the_memory(mode: str) -> None:
    moved = 2 * 2 * 16384 * 8192
    assert min(medians(replace(LARGE, mode=mode))) > moved / 10e12 * 1e9


def test_what_cannot_be_captured_says_so_and_the_others_get_their_times() -> None:
    right = KERNELS["torch.rms_norm"]

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        function = right.load(context, {})

        def call(x: torch.Tensor, *others: object) -> object:
            float(x[0, 0])
            return function(x, *others)

        return call

    looking = Kernel(replace(right.spec, kernel_id="test.looking"), load)
    point = contest("torch.rms_norm", "test.looking", context=replace(SMALL, mode="graph"), policy=BRIEF)
    first, second = measure_contest(point, {**KERNELS, "test.looking": looking}, device="cuda:0").outcomes
    assert first.status == "ok"
    assert len(first.samples_ns) == 4
    assert second.status == "failed"
    assert "cannot be captured in a CUDA graph" in second.message
    eager = replace(point, context=SMALL)
    outcomes = measure_contest(eager, {**KERNELS, "test.looking": looking}, device="cuda:0").outcomes
    assert [job.status for job in outcomes] == ["ok", "ok"]


def test_short_eager_calls_say_how_fast_their_core_was() -> None:
    longer = replace(LARGE, rows=4 * 16384)
    for context, is_watched in ((SMALL, True), (longer, False), (replace(SMALL, mode="graph"), False)):
        gpu = measure_contest(contest(*NAMES, context=context, policy=BRIEF), KERNELS, device="cuda:0").gpu
        assert gpu is not None
        assert (gpu.core_ns is not None) == is_watched


def test_rows_have_the_state_of_the_gpu() -> None:
    outcome = measure_contest(
        contest(*NAMES, context=replace(LARGE, mode="graph"), policy=BRIEF), KERNELS, device="cuda:0"
    )
    gpu = outcome.gpu
    assert gpu is not None
    assert gpu.clock_mhz
    assert gpu.lowest_clock_mhz
    assert 100 <= gpu.lowest_clock_mhz <= gpu.clock_mhz
    assert gpu.memory_clock_mhz
    assert gpu.power_w
    assert gpu.highest_power_w
    assert gpu.power_w <= gpu.highest_power_w


def test_the_state_of_the_gpu_is_read() -> None:
    state = GpuWatch(f"GPU-{torch.cuda.get_device_properties(0).uuid}").read()
    assert state.clock_mhz
    assert state.max_clock_mhz
    assert 100 <= state.clock_mhz <= state.max_clock_mhz
    assert state.power_w
    assert 10.0 < state.power_w < 2000.0
    assert state.temperature_c
    assert 10 < state.temperature_c < 110
    assert (state.lost > 0.0) == bool(state.slowed)
