"""Snapshots: publishing under load, exact counts, bounded memory, and no plan for another call's features."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, rms_norm, silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime import snapshot as snapshot_module
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CallCounters, Counter, CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import current_snapshot, publish_snapshot
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import registry_in_force

THREADS, CALLS = 6, 150
CPU = detect_device("cpu")


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run the work in threads that start together; what one of them raises is raised here."""
    barrier = threading.Barrier(count)
    raised: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def test_threads_are_served_rightly_while_snapshots_are_published(snapshot: Snapshot) -> None:
    stop = threading.Event()
    # Inductor's kernel wins nowhere here: compiling it anew for each snapshot would take seconds.
    gate, up = torch.randn(256, 512), torch.randn(256, 512)
    small = torch.randn(1, 32)
    query = torch.randn(1, 1, 16, 16)
    expected = (
        silu(gate) * up,
        silu(small) * small,
        torch.nn.functional.scaled_dot_product_attention(query, query, query),
    )
    context = SelectionContext(operation="mlp.swiglu", dtype="float32", rows=256, hidden_size=512, device=CPU)

    def work(number: int) -> None:
        if number == 0:
            for _ in range(25):
                publish_snapshot()
            stop.set()
            return
        calls = 0
        while calls < CALLS or not stop.is_set():
            results = lz.swiglu(gate, up), lz.swiglu(small, small), lz.attention(query, query, query)
            for result, right in zip(results, expected, strict=True):
                torch.testing.assert_close(result, right)
            assert lz.select(context).kernel_id == "torch.swiglu"
            counted = lz.stats()
            assert 0 <= counted["hits"] <= counted["calls"]
            calls += 1

    in_threads(work)
    assert current_snapshot() is not snapshot


def test_a_snapshot_serves_on_after_another_was_published(snapshot: Snapshot) -> None:
    gate = torch.randn(256, 512)
    lz.swiglu(gate, gate)
    [route] = snapshot._routes.values()
    published = publish_snapshot()
    assert published is current_snapshot()
    assert published is not snapshot
    assert published.seen.swiglu == ()
    torch.testing.assert_close(route.functions[route.decide(256, 512)](gate, gate), silu(gate) * gate)
    # A leaf that the old one had not used yet.
    small = gate[:1, :32].clone()
    torch.testing.assert_close(route.functions[route.decide(1, 32)](small, small), silu(small) * small)
    before = lz.stats()["calls"]
    lz.swiglu(gate, gate)
    assert lz.stats()["calls"] == before + 1


def test_threads_that_begin_together_are_all_counted(snapshot: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    """Of routes that several threads make at once all must use the same one."""
    caplog.set_level(logging.WARNING, "layerzero")
    small, wide = torch.randn(1, 32), torch.randn(1000, 64)

    def work(number: int) -> None:
        for _ in range(CALLS):
            lz.swiglu(small, small)
        lz.swiglu(wide, wide)

    for _ in range(5):
        publish_snapshot()
        before = lz.stats()
        in_threads(work)
        after = lz.stats()
        assert after["calls"] - before["calls"] == THREADS * (CALLS + 1)
        assert after["misses"] - before["misses"] == THREADS
    assert sum("first miss" in record.getMessage() for record in caplog.records) <= 1


def test_a_kernel_is_loaded_once_however_many_threads_ask(snapshot: Snapshot) -> None:
    loads: list[int] = []

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        loads.append(threading.get_ident())
        time.sleep(0.05)  # long enough for the others to come
        return lambda gate, up: silu(gate) * up

    spec = KernelSpec(
        kernel_id="test.counted", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",), priority=200
    )
    gate = torch.randn(8192, 32)  # far from every measured bucket
    with registry_in_force(Registry((*builtin_kernels(), Kernel(spec, load)))):
        in_threads(lambda number: torch.testing.assert_close(lz.swiglu(gate, gate), silu(gate) * gate))
    assert len(loads) == 1


def test_counters_lose_nothing() -> None:
    counter, group = Counter(), CounterGroup()

    def work(number: int) -> None:
        for _ in range(20_000):
            counter.raise_by_one()
            group.raise_by_one("one")

    in_threads(work)
    assert counter.value == THREADS * 20_000
    assert dict(group) == {"one": THREADS * 20_000}


@pytest.mark.scenario("FS-012")
def test_routes_are_bounded_and_every_call_is_counted_all_the_same(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    monkeypatch.setattr(snapshot_module, "MAX_ROUTES", 5)
    monkeypatch.setattr(dispatch, "_calls", CallCounters(5))
    snapshot = publish_snapshot()
    query = torch.randn(1, 1, 16, 16)
    for number in range(40):
        scale = 1.0 + number
        right = torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=scale)
        torch.testing.assert_close(lz.attention(query, query, query, scale=scale), right)
    for _ in range(3):
        lz.swiglu(query, query)
        lz.rms_norm(query, query[0, 0, 0], 1e-6, 0.25)
    assert len(snapshot._routes) == 5
    counted = lz.stats()
    assert (counted["calls"], counted["misses"]) == (46, 46)
    # One line for each route that was kept, and one for all the others.
    assert sum("first miss" in record.getMessage() for record in caplog.records) == 6


def test_features_never_share_a_function(snapshot: Snapshot) -> None:
    """What a loader bakes in is in the key: calls that differ in it alternate, on the slow path and the fast one."""
    x, weight = torch.randn(8, 128), torch.randn(128)
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 32, 16)
    grouped: dict[str, Any] = {"enable_gqa": True, "is_causal": True}
    mask = {
        alignment: torch.ones(6, 32).tril(shift).bool() for alignment, shift in (("top_left", 0), ("bottom_right", 26))
    }

    def masked(alignment: str) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, mask[alignment], enable_gqa=True)

    for _ in range(3):
        for offset in (0.0, 1.0, 0.5):
            right = rms_norm(x, (128,), weight + offset, 1e-6)
            torch.testing.assert_close(lz.rms_norm(x, weight, 1e-6, offset), right)
        for approximate in ("none", "tanh"):
            torch.testing.assert_close(lz.geglu(x, x, approximate), gelu(x, approximate=approximate) * x)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            y = x.to(dtype)
            torch.testing.assert_close(lz.swiglu(y, y), silu(y) * y)
        for alignment in ("top_left", "bottom_right"):
            output = lz.attention(query, key, key, causal_alignment=alignment, **grouped)
            torch.testing.assert_close(output, masked(alignment), rtol=1e-4, atol=1e-5)
            query_bshd, key_bshd = query.transpose(1, 2), key.transpose(1, 2)
            output = lz.attention(query_bshd, key_bshd, key_bshd, causal_alignment=alignment, layout="bshd", **grouped)
            torch.testing.assert_close(output.transpose(1, 2), masked(alignment), rtol=1e-4, atol=1e-5)


def test_configurations_never_share_a_function(snapshot: Snapshot) -> None:
    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        return lambda *arguments: json.dumps([dict(configuration), context.platform])

    spec = KernelSpec(
        kernel_id="test.shown", operations=("mlp.swiglu",), platforms=("cpu", "cuda"), dtypes=("float32",)
    )
    context = SelectionContext(operation="mlp.swiglu", dtype="float32", rows=4, hidden_size=4, device=CPU)
    operation = operation_named("mlp.swiglu")
    configurations: tuple[Configuration, ...] = ({}, {"a": 1}, {"a": True}, {"a": 1.0}, {"a": [1, 2]}, {"a": [2, 1]})
    shown = set()
    shown_kernel = Kernel(spec, load)
    for configuration in configurations:
        for device in (CPU, replace(CPU, platform="cuda")):
            placed = context.with_device(device)
            choice = Choice(shown_kernel, configuration)
            found = {snapshot.prepare(choice, operation, placed).function() for _ in range(2)}
            assert found == {json.dumps([configuration, device.platform])}
            shown |= found
    assert len(shown) == 2 * len(configurations)
