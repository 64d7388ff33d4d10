"""CS-017 to CS-026: tensors and models that move between devices; locks, and user code that calls back."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime import device as device_module
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device, forget_devices
from layerzero_runtime.devices.nvml import Gpu, Inventory
from layerzero_runtime.dispatch import current_snapshot, publish_snapshot
from layerzero_runtime.errors import ContextError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import A100, H100, attention, beside_builtin, kernel, norm, only
from tests.scenarios.failing_kernels import (
    TIMEOUT_S,
    Background,
    Body,
    Stop,
    in_threads,
    right,
    serve_rightly,
    swiglu_spec,
)

CPU = detect_device("cpu")
HOPPER, ANY = kernel("fa.v3", min_sm=(9, 0), priority=90), kernel("any.attention")
PROCESSOR = kernel("cpu.attention", platforms=("cpu",))


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.mark.scenario("CS-017")
def test_a_context_keeps_its_device_and_a_call_reads_its_own() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    context = SelectionContext.from_tensors("norm.rms", x, weight)
    assert context.device == CPU
    moved = x.to("meta")
    for call in (lambda: lz.rms_norm(moved, weight), lambda: SelectionContext.from_tensors("norm.rms", moved, weight)):
        with pytest.raises(ContextError, match="different devices: x meta, weight cpu; move them to one device"):
            call()
    assert context.device == CPU
    with only(HOPPER, ANY, PROCESSOR):
        described = attention()
        assert lz.select(described).kernel_id == "fa.v3"
        assert lz.select(described.with_device(A100)).kernel_id == "any.attention"
        assert described.device == H100


@pytest.mark.scenario("CS-018")
def test_each_layer_of_a_model_on_several_devices_selects_for_its_own() -> None:
    layers = [H100, H100, CPU, A100, CPU, H100]
    expected = {H100: "fa.v3", A100: "any.attention", CPU: "cpu.attention"}
    with only(HOPPER, ANY, PROCESSOR):
        batch = lz.select_batch([attention(device=device) for device in layers])
        assert [plan.kernel_id for plan in batch] == [expected[device] for device in layers]
        results = in_threads(lambda number: lz.select(attention(device=layers[number])).kernel_id, len(layers))
        assert results == [expected[device] for device in layers]
    # At the boundary, where a hidden state was not moved, the call says which tensor is where.
    with pytest.raises(ContextError, match="query cpu, key meta, value meta"):
        lz.attention(torch.ones(1, 1, 4, 8), *torch.ones(2, 1, 1, 4, 8, device="meta"))


@pytest.mark.scenario("CS-019")
def test_a_gpu_that_is_assigned_later_is_selected_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {
        "0": Gpu(name=H100.name, uuid="GPU-0", compute_capability=(9, 0), multiprocessors=132),
        "1": Gpu(name=A100.name, uuid="GPU-1", compute_capability=(8, 0), multiprocessors=108),
    }
    undescribed = attention(device=None)
    with only(HOPPER, ANY, PROCESSOR):
        try:
            forget_devices()
            with monkeypatch.context() as patch:
                patch.setattr(
                    "layerzero_runtime.devices.nvml.read_inventory", lambda library: Inventory(tuple(gpus.values()))
                )
                patch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
                for visible, kernel_id in (
                    ("0", "fa.v3"),
                    ("1", "any.attention"),
                    ("0", "fa.v3"),
                    ("", "cpu.attention"),
                ):
                    patch.setenv("CUDA_VISIBLE_DEVICES", visible)
                    forget_devices()
                    assert lz.select(undescribed).kernel_id == kernel_id
        finally:
            forget_devices()
        assert device_module.detect_device("cpu") == CPU
        assert len(current_snapshot().live_cache) == 3


@pytest.mark.scenario("CS-020")
def test_a_tensor_that_was_moved_between_two_calls_never_reaches_a_kernel() -> None:
    body = Body(lambda x, weight, eps, offset: torch.nn.functional.rms_norm(x, (8,), weight, eps))
    own = kernel("test.norm", body, operations=("norm.rms",), platforms=("cpu",), dtypes=("float32",), priority=200)
    x, weight = torch.randn(4, 8), torch.randn(8)
    swap: Callable[..., None] = torch.utils.swap_tensors
    with beside_builtin(own):
        for _ in range(2):
            lz.rms_norm(x, weight)
        swap(weight, torch.empty(8, device="meta"))  # the same object lies elsewhere now
        assert weight.device.type == "meta"
        with pytest.raises(ContextError, match="different devices: x cpu, weight meta"):
            lz.rms_norm(x, weight)
        assert body.calls == 2
        swap(weight, torch.ones(8))
        torch.testing.assert_close(lz.rms_norm(x, weight), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
        assert body.calls == 3


class _WatchedLock:
    """A lock that notes which locks its thread holds when it takes it."""

    held = threading.local()

    def __init__(self, name: str, pairs: set[tuple[str, str]]) -> None:
        self._name, self._pairs, self._lock = name, pairs, threading.Lock()

    def __enter__(self) -> None:
        holds = self.held.__dict__.setdefault("names", [])
        self._pairs.update((name, self._name) for name in holds)
        assert self._lock.acquire(timeout=TIMEOUT_S), f"{self._name} is not let go, behind {holds}"
        holds.append(self._name)

    def __exit__(self, *reason: object) -> None:
        self.held.names.remove(self._name)
        self._lock.release()


@pytest.mark.scenario("CS-022")
def test_locks_are_taken_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every order in which a thread took one lock while it held another, over all that changes state at once."""
    pairs: set[tuple[str, str]] = set()
    for owner, name in (
        (dispatch, "_build_lock"),
        (dispatch, "_sources_lock"),
        (dispatch.health(), "_lock"),
        (dispatch._prepared, "_lock"),
    ):
        label = f"{type(owner).__name__}.{name}"
        monkeypatch.setattr(owner, name, _WatchedLock(label if owner is not dispatch else name, pairs))

    def work(number: int) -> None:
        for turn in range(15):
            lz.register_kernel(swiglu_spec(f"test.number_{number}"), right)
            if number % 2:
                lz.set_policy(Policy(denies=(Rule(kernel=f"test.number_{turn}"),)))
            dispatch.health().failed(f"test.number_{number}", "on purpose")
            serve_rightly()
            lz.stats()
            dispatch.health().reset()
            publish_snapshot()
            lz.unregister_kernel(f"test.number_{number}")

    in_threads(work, 6)
    assert ("_build_lock", "_sources_lock") in pairs
    assert ("_build_lock", "Health._lock") in pairs
    reachable = dict.fromkeys(pairs)
    while further := {(a, d) for a, b in reachable for c, d in reachable if b == c} - reachable.keys():
        reachable.update(dict.fromkeys(further))
    assert not [name for name, other in reachable if name == other]


def _everything(number: int) -> None:
    """All that user code may do to the library, from inside of it."""
    lz.select(norm())
    lz.explain(norm())
    lz.register_kernel(swiglu_spec(f"test.inner_{number}", priority=1), right)
    lz.set_policy(Policy(denies=(Rule(kernel=f"test.inner_{number}"),)))
    lz.rms_norm(torch.randn(2, 4), torch.randn(4))
    publish_snapshot()
    dispatch.health().failed(f"test.inner_{number}", "on purpose")
    lz.unregister_kernel(f"test.inner_{number}")
    assert lz.stats()["calls"] > 0


@pytest.mark.scenario("CS-023")
@pytest.mark.parametrize("place", ["the kernel", "its loader", "its failure"])
def test_user_code_may_call_back_from_wherever_it_runs(place: str) -> None:
    visits: list[str] = []

    def call_back(where: str) -> None:
        if where == place:
            visits.append(where)
            _everything(len(visits))

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        call_back("its loader")

        def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            call_back("the kernel")
            if place == "its failure":
                call_back("its failure")
                raise RuntimeError("on purpose")
            return right(gate, up)

        return run

    with beside_builtin(Kernel(swiglu_spec("test.outer"), load)):
        Background(serve_rightly).result()
    assert visits == [place]


@pytest.mark.scenario("CS-024")
@pytest.mark.parametrize("place", ["kernels", "loaders"])
def test_user_code_of_two_kernels_may_wait_for_each_other(place: str) -> None:
    """Each of two kernels goes on only when the other one runs too, and changes the policy while the other waits."""
    meeting = threading.Barrier(2)

    def meet(where: str) -> None:
        if where == place:
            meeting.wait(TIMEOUT_S / 4)
            lz.set_policy(None)
            meeting.wait(TIMEOUT_S / 4)

    def loader(function: Callable[..., Any]) -> Callable[[SelectionContext, Configuration], KernelFunction]:
        def run(*arguments: Any) -> Any:
            meet("kernels")
            return function(*arguments)

        def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
            meet("loaders")
            return run

        return load

    def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (8,), weight, eps)

    activation = Kernel(swiglu_spec("test.activation"), loader(right))
    normalisation = Kernel(swiglu_spec("test.norm", operations=("norm.rms",)), loader(normalise))
    x = torch.randn(4, 8)
    with beside_builtin(activation, normalisation):
        other = Background(lambda: lz.rms_norm(x, torch.ones(8)))
        serve_rightly()
        torch.testing.assert_close(other.result(), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
        assert lz.stats().broken == ()


@pytest.mark.scenario("CS-025")
def test_a_kernel_that_goes_between_selection_and_use_still_serves_and_is_then_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop, prepare = Stop(), Snapshot.prepare

    def stop_and_prepare(*arguments: Any) -> Any:
        stop.come_by()
        return prepare(*arguments)

    monkeypatch.setattr(Snapshot, "prepare", stop_and_prepare)
    body = Body()
    lz.register_kernel(swiglu_spec("test.passing"), body)
    running = Background(serve_rightly)
    stop.wait_until_reached()
    lz.unregister_kernel("test.passing")
    serve_rightly()
    assert body.calls == 0
    stop.let_go()
    running.result()
    assert body.calls == 1
    serve_rightly()
    assert (body.calls, lz.stats().broken) == (1, ())


@pytest.mark.scenario("CS-025")
def test_a_kernel_that_was_unregistered_is_not_kept() -> None:
    body = Body()
    lz.register_kernel(swiglu_spec("test.passing"), body)
    serve_rightly()
    assert body.calls == 1
    lz.unregister_kernel("test.passing")
    kept = weakref.ref(body)
    del body
    gc.collect()
    assert kept() is None


@pytest.mark.scenario("CS-026")
def test_evictions_at_once_keep_the_cache_whole() -> None:
    cache: LiveCache[int] = LiveCache(3)

    def work(number: int) -> None:
        for turn in range(2000):
            key = (turn * 7 + number) % 11
            assert cache.get(key, lambda key=key: key + 1)[0] == key + 1  # type: ignore[misc]
            assert len(cache) <= 3

    in_threads(work, 8)
    assert cache.computed.value + cache.hits.value >= 8 * 2000
    # As good as new: the last three stay, the fourth pushes the oldest out.
    for key in (100, 101, 102, 103):
        cache.get(key, lambda: 0)
    assert [cache.get(key, lambda: 0)[1] for key in (101, 102, 103, 100)] == [True, True, True, False]
