"""FS-028: memory that is there at times only; when a kernel that failed is tried again, and by which call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.policies.policy import Policy, Rule
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import beside_builtin, only
from tests.scenarios.failing_kernels import (
    Background,
    Body,
    Stop,
    clock_by_hand,
    raising,
    refusal,
    right,
    serve_rightly,
    swiglu_kernel,
)

FRAGMENTED = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
    "free. Of the allocated memory 40.00 GiB is allocated by PyTorch, and 37.00 GiB is reserved by PyTorch but "
    "unallocated."
)


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.mark.scenario("FS-028")
def test_memory_that_is_fragmented_now_is_tried_again_later() -> None:
    body = Body(raising(torch.OutOfMemoryError(FRAGMENTED)))
    with clock_by_hand() as clock, beside_builtin(swiglu_kernel("test.large", body)):
        serve_rightly()
        [breaker] = dispatch.health().broken.values()
        assert (breaker.failures, breaker.until_s - breaker.since_s) == (1, 30.0)
        assert "37.00 GiB is reserved by PyTorch but unallocated" in refusal("test.large")
        clock.move(29.0)
        serve_rightly()
        assert body.calls == 1
        clock.move(1.0)
        serve_rightly()
        # The probe failed: twice the pause.
        [breaker] = dispatch.health().broken.values()
        assert (body.calls, breaker.failures, breaker.until_s - breaker.since_s) == (2, 2, 60.0)
        body.act = right
        clock.move(60.0)
        serve_rightly()
        assert (body.calls, lz.stats().broken) == (3, ())
        assert refusal("test.large") == ""
        serve_rightly()
        assert body.calls == 4


@pytest.mark.scenario("FS-028")
def test_one_call_at_a_time_tries_a_kernel_that_failed() -> None:
    stop = Stop()
    body = Body(raising(torch.OutOfMemoryError(FRAGMENTED)))
    with clock_by_hand() as clock, beside_builtin(swiglu_kernel("test.large", body)):
        serve_rightly()

        def held(*arguments: torch.Tensor) -> torch.Tensor:
            stop.come_by()
            return right(*arguments)

        body.act = held
        clock.move(30.0)
        probe = Background(serve_rightly)
        stop.wait_until_reached()
        for _ in range(3):
            serve_rightly()
        assert body.calls == 2
        stop.let_go()
        probe.result()
        serve_rightly()
        assert body.calls == 3


@pytest.mark.scenario("FS-028")
def test_a_call_beside_a_probe_blames_the_kernel_that_failed_it() -> None:
    """Three kernels: one is being tried again, the second fails meanwhile, the third serves."""
    stop = Stop()
    first, second, third = Body(raising(torch.OutOfMemoryError(FRAGMENTED))), Body(), Body()
    kernels = [
        swiglu_kernel(f"test.{n}", b, priority=p) for n, b, p in (("a", first, 3), ("b", second, 2), ("c", third, 1))
    ]
    with clock_by_hand() as clock, only(*kernels):
        serve_rightly()

        def held(*arguments: torch.Tensor) -> torch.Tensor:
            stop.come_by()
            return right(*arguments)

        first.act, second.act = held, raising(RuntimeError("fails beside the probe"))
        clock.move(30.0)
        probe = Background(serve_rightly)
        stop.wait_until_reached()
        serve_rightly()
        assert (first.calls, second.calls, third.calls) == (2, 2, 1)
        assert lz.stats().broken == ("test.b",)
        stop.let_go()
        probe.result()
        assert refusal("test.a") == ""
        assert "fails beside the probe" in refusal("test.b")


@pytest.mark.scenario("FS-028")
def test_a_kernel_that_is_locked_or_alone_is_no_dead_end_while_it_is_tried_again() -> None:
    stop = Stop()
    locked = Body(raising(torch.OutOfMemoryError(FRAGMENTED)))
    other = Body()
    lz.set_policy(Policy(locks=(Rule(kernel="test.locked"),)))
    kernels = swiglu_kernel("test.locked", locked, priority=1), swiglu_kernel("test.other", other)
    with clock_by_hand() as clock, only(*kernels):
        # The lock gives way to a kernel that works.
        serve_rightly()
        assert (locked.calls, other.calls) == (1, 1)

        def held(*arguments: torch.Tensor) -> torch.Tensor:
            stop.come_by()
            return right(*arguments)

        locked.act = held
        clock.move(30.0)
        probe = Background(serve_rightly)
        stop.wait_until_reached()
        serve_rightly()
        assert (locked.calls, other.calls) == (2, 2)
        lz.set_policy(Policy(denies=(Rule(kernel="test.other"),)))
        serve_rightly()
        assert (locked.calls, other.calls) == (3, 2)
        stop.let_go()
        probe.result()


@pytest.mark.scenario("FS-028")
def test_a_probe_that_ends_in_the_callers_error_leaves_the_next_call_to_probe() -> None:
    body, other = Body(raising(torch.OutOfMemoryError(FRAGMENTED))), Body()
    with (
        clock_by_hand() as clock,
        only(swiglu_kernel("test.large", body), swiglu_kernel("torch.swiglu", other, priority=1)),
    ):
        serve_rightly()
        clock.move(30.0)
        other.act = raising(ValueError("nobody can serve this call"))
        with pytest.raises(ValueError, match="nobody can serve this call"):
            serve_rightly()
        body.act = other.act = right
        calls = body.calls
        serve_rightly()
        assert body.calls == calls + 1
        assert lz.stats().broken == ()
