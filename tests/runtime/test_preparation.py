"""What compiles, or has not been tried, waits for `warmup`; graph mode and capture get what was prepared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.errors import ContextError, KernelExecutionError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.serving import execution
from layerzero_runtime.serving.execution import STATE
from layerzero_runtime.serving.prepared import PreparedKernels
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import capture_in_force
from tests.runtime.test_dispatch import (
    DEFAULT,
    FAR,
    INDUCTOR,
    MIDDLE,
    SMALL,
    Failing,
    changes,
    kernel_named,
    kernels_in_force,
    swiglu,
    swiglu_context,
)


@pytest.fixture(autouse=True)
def as_in_serving(monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot) -> None:
    """Nothing is prepared yet, whatever the tests before have used."""
    monkeypatch.setattr(STATE, "preparation", "warmup")
    monkeypatch.setattr(dispatch, "_prepared", PreparedKernels())
    dispatch.publish_snapshot()


def compiling(kernel_id: str = "test.compiling") -> tuple[Kernel, Failing]:
    """A kernel of the highest priority that must compile, and fails at it."""
    failing = Failing(kernel_named(DEFAULT))
    spec = replace(kernel_named(DEFAULT).spec, kernel_id=kernel_id, priority=500, compiles=True)
    return Kernel(spec, failing), failing


def test_a_plan_that_compiles_serves_no_call_before_warmup_and_every_call_after_it() -> None:
    before = lz.stats()
    for _ in range(3):
        swiglu(*MIDDLE)
    assert changes(before) == {"calls": 3, "hits": 3, "unprepared": 3}
    [plan] = lz.warmup([swiglu_context(*MIDDLE)])
    assert (plan.kernel_id, plan.source) == (INDUCTOR, "table")
    before = lz.stats()
    gate = torch.randn(*MIDDLE)
    with torch.profiler.profile() as profile:
        output = lz.swiglu(gate, gate)
    assert changes(before) == {"calls": 1, "hits": 1}
    # The default is written out with it, the compiled kernel is not.
    assert "aten::silu" not in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(output, silu(gate) * gate)
    assert lz.explain(swiglu_context(*MIDDLE)).plan.kernel_id == INDUCTOR


def test_no_call_loads_what_waits_for_warmup() -> None:
    failing = Failing(kernel_named(INDUCTOR))
    with kernels_in_force(replace(kernel_named(INDUCTOR), load=failing)):
        for _ in range(2):
            swiglu(*MIDDLE)
        assert failing.attempts == 0


def test_a_miss_does_not_wait_either() -> None:
    kernel, failing = compiling()
    before = lz.stats()
    with kernels_in_force(kernel):
        assert lz.select(swiglu_context(*FAR)).kernel_id == "test.compiling"
        for _ in range(2):
            swiglu(*FAR)
        assert failing.attempts == 0
        assert changes(before)["unprepared"] == 2
        lz.preparation("on_first_use")
        swiglu(*FAR)
        assert failing.attempts == 1
        assert lz.stats().broken == ("test.compiling",)


def test_warmup_replaces_what_fails_in_it() -> None:
    kernel, failing = compiling()
    with kernels_in_force(kernel):
        [plan] = lz.warmup([swiglu_context(*FAR)])
        assert failing.attempts == 1
        assert plan.kernel_id == DEFAULT
        assert lz.stats().broken == ("test.compiling",)


def test_warmup_refuses_what_it_cannot_try() -> None:
    elsewhere = replace(swiglu_context(*SMALL), device=lz.DeviceSpec("hpu", "Intel Gaudi 3"))
    with pytest.raises(ContextError, match="warmup is for the devices of this machine"):
        lz.warmup([elsewhere])
    with pytest.raises(ContextError, match="needs rows"):
        lz.warmup([lz.SelectionContext(operation="norm.rms", dtype="float32", hidden_size=4)])


def test_names_of_modes_and_preparations_are_checked() -> None:
    with pytest.raises(ContextError, match="mode is 'fast', allowed: eager, graph"), lz.execution_mode("fast"):
        pass
    with pytest.raises(ContextError, match="preparation is 'never', allowed: warmup, on_first_use"):
        lz.preparation("never")


def test_graph_mode_asks_for_the_graph_table_in_its_own_block_and_thread(tmp_path: object) -> None:
    """The synthetic table has none, so such calls miss; eager ones beside them hit as ever."""
    swiglu(*SMALL)
    before = lz.stats()
    with lz.execution_mode("graph"):
        swiglu(*SMALL)
        assert changes(before) == {"calls": 1, "misses": 1}
        thread = threading.Thread(target=swiglu, args=SMALL)
        thread.start()
        thread.join()
        assert changes(before) == {"calls": 2, "misses": 1, "hits": 1}
        with lz.execution_mode("eager"):
            swiglu(*SMALL)
    swiglu(*SMALL)
    assert changes(before) == {"calls": 4, "misses": 1, "hits": 3}
    assert PUBLISHED.special == 0


@pytest.fixture
def capturing() -> Iterator[None]:
    with capture_in_force():
        yield


def test_under_capture_only_what_was_prepared_serves(capturing: None) -> None:
    failing = replace(kernel_named("torch.swiglu.in_place"), load=Failing(kernel_named("torch.swiglu.in_place")))
    spec = replace(failing.spec, priority=500, kernel_id="test.unprepared")
    with kernels_in_force(replace(failing, spec=spec)):
        before = lz.stats()
        swiglu(*FAR)
        assert changes(before)["unprepared"] == 1
        assert lz.stats().broken == ()


def test_under_capture_nothing_is_retried(capturing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if raising.armed:  # type: ignore[attr-defined]
            raise RuntimeError("operation not permitted when stream is capturing")
        return silu(gate) * up

    raising.armed = False  # type: ignore[attr-defined]
    spec = replace(kernel_named(DEFAULT).spec, kernel_id="test.raising", priority=500)
    with kernels_in_force(Kernel(spec, lambda context, configuration: raising)):
        monkeypatch.setattr(execution, "is_capturing", lambda: False)
        with lz.execution_mode("graph"):
            context = replace(swiglu_context(*FAR), mode="graph")
            assert lz.warmup([context])[0].kernel_id == "test.raising"
        monkeypatch.setattr(execution, "is_capturing", lambda: True)
        raising.armed = True  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="stream is capturing"):
            swiglu(*FAR)
        assert lz.stats().broken == ()


def test_a_default_that_fails_in_warmup_is_the_callers_error() -> None:
    failing = replace(kernel_named(DEFAULT), load=Failing(kernel_named(DEFAULT)))
    with kernels_in_force(failing), pytest.raises(KernelExecutionError, match=r"torch.swiglu failed to load"):
        lz.warmup([swiglu_context(*FAR)])
