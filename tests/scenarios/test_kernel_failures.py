"""FS-001 to FS-013: kernels that crash, hang, give wrong results or find no memory."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import layerzero_runtime as lz
from layerzero_runtime import dispatch, ranks
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import KernelExecutionError, NoKernelAvailableError
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.serving.prepared import PreparedKernels
from layerzero_tune.measure import bench, contest_run
from layerzero_tune.measure.clock import time_calls
from layerzero_tune.measure.processor_speed import ProcessorSpeed
from layerzero_tune.worker import WorkerProcess
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.time_limits import TimeLimits
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import attention, beside_builtin, kernel, only
from tests.scenarios.failing_kernels import (
    Body,
    count_of,
    raising,
    refusal,
    right,
    serve_rightly,
    swiglu_context,
    swiglu_kernel,
)
from tests.tune.contests import contest

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 144115188075855872 bytes."
CUDA_ALLOCATOR = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB."


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.mark.scenario("FS-001")
@pytest.mark.scenario("FS-006")
@pytest.mark.scenario("FS-008")
@pytest.mark.scenario("FS-009")
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: misaligned address",
        "CUDA error: unspecified launch failure",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: unknown error",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: context is destroyed",
        "CUDA error: invalid program counter",
    ],
)
def test_a_lost_device_is_reported_with_the_whole_call_and_not_retried(message: str) -> None:
    broken = Body(raising(RuntimeError(f"{message}\nCUDA kernel errors might be reported at some other call.")))
    other = Body()
    fallbacks = count_of("fallbacks")
    with only(swiglu_kernel("test.broken", broken), swiglu_kernel("test.other", other, priority=1)):
        with pytest.raises(KernelExecutionError) as raised:
            lz.swiglu(torch.randn(4, 8), torch.randn(4, 8))
        assert lz.stats().broken == ()
    for part in ("test.broken", message, "'mlp.swiglu'", "'rows': 4", "'hidden_size': 8", "'float32'", "restart it"):
        assert part in str(raised.value)
    assert detect_device("cpu").name in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert (broken.calls, other.calls, count_of("fallbacks")) == (1, 0, fallbacks)


@pytest.mark.scenario("FS-002")
def test_a_kernel_that_hangs_costs_one_measurement() -> None:
    with WorkerProcess(("tests.tune.torture_kernels",)) as worker:
        outcome = worker.run(contest("torture.right", "torture.hangs", "torture.right_too"), TimeLimits(shortest_s=1.0))
        before, hung, behind = outcome.outcomes
        assert (before.status, hung.status, behind.status) == ("ok", "timeout", "ok")
        assert hung.message == "no progress for 1 s at first call"
        assert hung.samples_ns == ()
        assert worker.run(contest("torture.right")).outcomes[0].status == "ok"


@pytest.mark.scenario("FS-003")
@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda gate, up: right(gate, up)[:-1], "output 0 has shape (3, 8), required (4, 8)"),
        (lambda gate, up: right(gate, up).double(), "output 0 has dtype float64, required float32"),
        (lambda gate, up: (right(gate, up), gate), "gives 2 outputs, required 1"),
        (lambda gate, up: None, "output 0 is a NoneType, required a tensor"),
    ],
)
def test_a_result_of_another_form_never_reaches_the_caller(
    act: Callable[..., Any], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    body = Body(act)
    fallbacks = count_of("fallbacks")
    with beside_builtin(swiglu_kernel("test.odd", body)):
        serve_rightly()
        assert f"test.odd {fault}" in caplog.text
        assert fault in refusal("test.odd")
        assert lz.stats().broken == ("test.odd",)
        assert count_of("fallbacks") == fallbacks + 1
        serve_rightly()
    assert body.calls == 1
    dispatch.health().reset()
    with only(swiglu_kernel("test.odd", body)):
        with pytest.raises(KernelExecutionError) as raised:
            lz.swiglu(torch.randn(4, 8), torch.randn(4, 8))
        assert fault in str(raised.value)


@pytest.mark.scenario("FS-004")
def test_verification_finds_a_kernel_that_is_silently_wrong(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    body = Body()
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    with beside_builtin(swiglu_kernel("test.sloppy", body)):
        lz.verify_results(3)
        verified, wrong = count_of("verified"), count_of("wrong_results")
        for _ in range(3):
            serve_rightly()
        assert (count_of("verified"), count_of("wrong_results")) == (verified + 1, wrong)
        assert lz.stats().broken == ()
        body.act = lambda gate, up: right(gate, up) * 1.001
        torch.testing.assert_close(lz.swiglu(gate, up), right(gate, up))
        assert (count_of("verified"), count_of("wrong_results")) == (verified + 2, wrong + 1)
        assert lz.stats().broken == ("test.sloppy",)
        assert "test.sloppy gave a wrong result at {'operation': 'mlp.swiglu'" in caplog.text
        assert "a wrong result, relative error 1.0" in refusal("test.sloppy")
        serve_rightly()
        assert body.calls == 4


@pytest.mark.scenario("FS-004")
def test_without_verification_a_wrong_value_is_the_callers() -> None:
    """Which is why the tuner checks every kernel before its time counts."""
    gate = torch.randn(4, 8)
    with beside_builtin(swiglu_kernel("test.sloppy", lambda gate, up: right(gate, up) * 2)):
        torch.testing.assert_close(lz.swiglu(gate, gate), right(gate, gate) * 2)
    torture = load_kernels(("tests.tune.torture_kernels",))
    _, outcome = contest_run.measure_contest(contest("torture.right", "torture.inaccurate"), torture).outcomes
    assert (outcome.status, outcome.samples_ns) == ("wrong", ())


@pytest.mark.scenario("FS-005")
@pytest.mark.scenario("FS-010")
@pytest.mark.parametrize("preferred", ["test.greedy", "torch.swiglu"])
@pytest.mark.parametrize(
    ("act", "details"),
    [
        (raising(MemoryError("32 GiB of pinned memory")), "32 GiB of pinned memory"),
        (raising(torch.OutOfMemoryError(CUDA_ALLOCATOR)), CUDA_ALLOCATOR),
        (lambda gate, up: torch.empty(1 << 55), CPU_ALLOCATOR),
    ],
)
def test_without_memory_a_smaller_kernel_serves(
    act: Callable[..., Any], details: str, preferred: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it is the operation's default that finds none."""
    caplog.set_level(logging.WARNING, "layerzero")
    greedy, small = Body(act), Body()
    with only(swiglu_kernel(preferred, greedy), swiglu_kernel("test.small", small, priority=1)):
        serve_rightly()
        assert (greedy.calls, small.calls) == (1, 1)
        assert lz.stats().broken == (preferred,)
        assert details in refusal(preferred)
        assert details in caplog.text
        serve_rightly()
        assert (greedy.calls, small.calls) == (1, 2)


@pytest.mark.scenario("FS-005")
def test_where_every_kernel_lacks_memory_the_first_error_is_the_callers_whole() -> None:
    greedy = Body(raising(torch.OutOfMemoryError(CUDA_ALLOCATOR)))
    with only(swiglu_kernel("torch.swiglu", greedy), swiglu_kernel("test.small", greedy, priority=1)):
        with pytest.raises(torch.OutOfMemoryError) as raised:
            lz.swiglu(torch.randn(4, 8), torch.randn(4, 8))
        assert str(raised.value) == CUDA_ALLOCATOR
        assert lz.stats().broken == ()


@pytest.mark.scenario("FS-007")
def test_a_machine_that_slows_down_is_measured_again_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time that others take, or the hypervisor, is the slowdown that a CPU shows."""
    shares = iter([0.6, 0.3, 0.01])
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: next(shares))
    monkeypatch.setattr(bench, "_parallel_speed", lambda: ProcessorSpeed(lambda: 1.0))
    steps: list[tuple[int | None, str]] = []
    outcome = contest_run.measure_contest(
        contest("torch.rms_norm", "torch.rms_norm.fused"),
        load_kernels(),
        progress=lambda candidate, step: steps.append((candidate, step)),
    )
    assert outcome.contention == 0.01
    assert [step for step in steps if step == (0, "warm-up")] == [(0, "warm-up")] * 3
    assert all(len(job.samples_ns) in (0, 4) for job in outcome.outcomes)


@pytest.mark.scenario("FS-010")
def test_a_kernel_whose_workspace_is_too_large_is_not_selected() -> None:
    mebibyte = 1 << 20
    large = kernel("large.attention", workspace_bytes=64 * mebibyte, priority=90)
    small = kernel("small.attention", workspace_bytes=mebibyte)
    with only(large, small):
        assert lz.select(attention()).kernel_id == "large.attention"
        assert lz.select(attention(workspace_limit=64 * mebibyte)).kernel_id == "large.attention"
        limited = attention(workspace_limit=64 * mebibyte - 1)
        assert lz.select(limited).kernel_id == "small.attention"
        assert lz.explain(limited).refused["large.attention"] == (
            "WORKSPACE_LIMIT_NOT_AT_LEAST: workspace_limit is 67108863, required >= 67108864",
        )
        with pytest.raises(NoKernelAvailableError, match="required >= 1048576") as raised:
            lz.select(attention(workspace_limit=0))
        assert set(raised.value.rejections) == {"large.attention", "small.attention"}


@pytest.mark.scenario("FS-011")
def test_an_output_that_cannot_be_allocated_is_an_error_before_anything_is_computed() -> None:
    computed: list[Tensor] = []

    def allocate_first(gate: Tensor, up: Tensor) -> Tensor:
        output = gate.new_empty(gate.shape)
        computed.append(output)
        return output.copy_(right(gate, up))

    with only(
        swiglu_kernel("test.fast", allocate_first),
        swiglu_kernel("torch.swiglu", allocate_first, priority=1),
    ):
        huge = torch.zeros(1, 1).expand(1 << 25, 1 << 25)
        with pytest.raises(RuntimeError, match=r"allocate memory: you tried to allocate \d+ bytes"):
            lz.swiglu(huge, huge)
        assert computed == []
        # It was this call's size, no fault of a kernel.
        assert lz.stats().broken == ()
        serve_rightly()
        assert lz.select(swiglu_context()).kernel_id == "test.fast"


@pytest.mark.scenario("FS-012")
def test_the_live_cache_stays_within_its_bound_and_right() -> None:
    wide = kernel("wide.attention", min_head_dim=128, priority=90)
    with only(wide, kernel("any.attention")) as snapshot:
        snapshot.live_cache = LiveCache(4)
        for _ in range(2):
            for exponent in range(12):
                for head_dim in (64, 128):
                    plan = lz.select(attention(batch_size=1 << exponent, head_dim=head_dim))
                    assert plan.kernel_id == ("wide.attention" if head_dim == 128 else "any.attention")
                    assert len(snapshot.live_cache) <= 4
        # The oldest goes first: the last that came is still there, the first is computed again.
        computed = snapshot.live_cache.computed.value
        assert computed == 48
        assert lz.select(attention(batch_size=1 << 11, head_dim=128)).cached
        assert not lz.select(attention(batch_size=1)).cached


@pytest.mark.scenario("FS-012")
def test_no_memory_is_kept_for_features_that_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale or a dropout that changes at every call is part of the key."""
    monkeypatch.setattr("layerzero_runtime.serving.prepared.MAX_PREPARED", 8)
    prepared = PreparedKernels()
    monkeypatch.setattr(dispatch, "_prepared", prepared)
    dispatch.publish_snapshot()
    query = torch.randn(1, 1, 4, 8)
    for number in range(40):
        scale = 1.0 + number
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=scale)
        torch.testing.assert_close(lz.attention(query, query, query, scale=scale), expected)
    assert len(prepared._prepared) == 8


@pytest.mark.scenario("FS-013")
def test_the_clock_runs_while_the_garbage_collector_does_not() -> None:
    seen: list[bool] = []

    def look(fails: bool) -> None:
        seen.append(gc.isenabled())
        if fails:
            raise ValueError("on purpose")

    assert gc.isenabled()
    assert math.isfinite(time_calls(look, [(False,)] * 3))
    assert gc.isenabled()
    with pytest.raises(ValueError, match="on purpose"):
        time_calls(look, [(True,)])
    assert gc.isenabled()
    gc.disable()
    try:
        time_calls(look, [(False,)])
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert seen == [False] * 5


def test_with_ranks_attached_no_kernel_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, other = Body(raising(RuntimeError("no such tile"))), Body()
    monkeypatch.setattr(ranks, "_group", object())
    with only(swiglu_kernel("test.broken", broken), swiglu_kernel("test.other", other, priority=1)):
        with pytest.raises(KernelExecutionError, match=r"test.broken failed \(RuntimeError: no such tile\).*ranks"):
            lz.swiglu(torch.randn(4, 8), torch.randn(4, 8))
        assert lz.stats().broken == ()
    assert (broken.calls, other.calls) == (1, 0)


@pytest.mark.scenario("FS-011")
def test_a_callers_own_mistake_trips_no_breaker() -> None:
    weight = torch.ones(8)
    context = SelectionContext(
        operation="norm.rms", dtype="float32", rows=4, hidden_size=8, device=detect_device("cpu")
    )
    own = kernel(
        "test.norm",
        lambda x, weight, eps, offset: x * weight * eps,
        operations=("norm.rms",),
        platforms=("cpu",),
        dtypes=("float32",),
        priority=200,
    )
    with beside_builtin(own):
        for mistake in ("one", None.__class__):
            with pytest.raises(TypeError):
                lz.rms_norm(torch.randn(4, 8), weight, eps=mistake)  # type: ignore[arg-type]
        assert lz.stats().broken == ()
        assert lz.select(context).kernel_id == "test.norm"
