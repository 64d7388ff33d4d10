"""Norms and activations of other libraries on a CUDA device: under capture, on streams and devices, served by `lz`.

What a call of them costs on the host is printed (`pytest -s`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter_ns
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.policies.policy import Rule
from tests.gpu.row_adapters import EACH, as_tuple, context_of, default_of, draw, reference
from tests.runtime.kernel_calls import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kernel", EACH)
def test_a_capture_replays_on_new_values(kernel: Kernel) -> None:
    context = context_of(kernel, "bfloat16", 65, 1024)
    function = kernel.load(context, {})
    arguments = draw(context)
    function(*arguments)
    before = lz.stats().get("not_compiled_in_capture", 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = as_tuple(function(*arguments))
    assert lz.stats().get("not_compiled_in_capture", 0) == before
    for seed in (1, 2):
        for given, fresh in zip(arguments, draw(context, seed), strict=True):
            if isinstance(given, torch.Tensor):
                given.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        again = as_tuple(function(*arguments))
        assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
        assert relative_error(again, reference(context, arguments)) < 1e-2


@pytest.mark.parametrize("kernel", EACH)
def test_a_captured_call_of_a_new_width_is_right(kernel: Kernel) -> None:
    """Of libraries that compile for a width, by the default in their place."""
    known, unknown = context_of(kernel, "bfloat16", 65, 1024), context_of(kernel, "bfloat16", 65, 1152)
    function = kernel.load(known, {})
    function(*draw(known))
    arguments = draw(unknown)
    before = lz.stats().get("not_compiled_in_capture", 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = as_tuple(function(*arguments))
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(outputs, reference(unknown, arguments)) < 1e-2
    compiles_by_width = kernel.spec.library in ("liger-kernel", "quack-kernels")
    assert lz.stats().get("not_compiled_in_capture", 0) == before + compiles_by_width


@pytest.mark.parametrize("kernel", EACH)
def test_a_call_runs_on_the_current_stream(kernel: Kernel) -> None:
    context = context_of(kernel, "bfloat16", 129, 4096)
    function = kernel.load(context, {})
    arguments = draw(context)
    expected = as_tuple(function(*arguments))
    delayed = tuple(torch.zeros_like(part) if isinstance(part, torch.Tensor) else part for part in arguments)
    torch.cuda.synchronize()
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call] # tens of ms
        for room, value in zip(delayed, arguments, strict=True):
            if isinstance(room, torch.Tensor):
                room.copy_(value)
        outputs = as_tuple(function(*delayed))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernel", EACH)
def test_a_call_runs_on_the_device_of_its_tensors(kernel: Kernel) -> None:
    context = replace(context_of(kernel, "bfloat16", 65, 1024), device=detect_device("cuda:0"))
    function = kernel.load(context, {})
    arguments = draw(context)
    expected = as_tuple(function(*arguments))
    there = tuple(part.to("cuda:1") if isinstance(part, torch.Tensor) else part for part in arguments)
    for _ in range(2):
        outputs = as_tuple(function(*there))
        assert torch.cuda.current_device() == 0
        for output, right in zip(outputs, expected, strict=True):
            assert output.device == torch.device("cuda:1")
            assert torch.equal(output.cpu(), right.cpu())


@pytest.mark.parametrize("kernel", EACH)
def test_it_serves_public_calls_after_warmup(kernel: Kernel) -> None:
    """Locked for a call, prepared by warmup, captured in a graph."""
    context = context_of(kernel, "bfloat16", 8, 2048, mode="graph")
    x, other, weight = torch.randn(3, 8, 2048, device="cuda").bfloat16().unbind()
    vector = weight[0]
    calls: dict[str, Callable[[], Any]] = {
        "norm.rms": lambda: lz.rms_norm(x, vector),
        "norm.add_rms": lambda: lz.add_rms_norm(x, other, vector),
        "norm.layer": lambda: lz.layer_norm(x, vector, vector),
        "mlp.swiglu": lambda: lz.swiglu(x, other),
        "mlp.geglu": lambda: lz.geglu(x, other, approximate="tanh"),
    }
    call = calls[context.operation]
    try:
        lz.set_policy(lz.Policy(locks=(Rule(kernel=kernel.kernel_id),)))
        assert [plan.kernel_id for plan in lz.warmup([context])] == [kernel.kernel_id]
        with torch.inference_mode():
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = as_tuple(call())
            graph.replay()
        torch.cuda.synchronize()
    finally:
        lz.set_policy(None)
    arguments = {
        "norm.rms": (x, vector, 1e-6, 0.0),
        "norm.add_rms": (x, other, vector, 1e-6),
        "norm.layer": (x, vector, vector, 1e-5),
    }.get(context.operation, (x, other))
    assert relative_error(captured, reference(context, arguments)) < 1e-2


@pytest.mark.parametrize("kernel", EACH)
def test_the_hosts_time_of_a_call_is_printed(kernel: Kernel) -> None:
    """Of 8 rows, so that the device waits for the host; beside the operation's default."""
    context = context_of(kernel, "bfloat16", 8, 1024)
    arguments = draw(context)
    functions = {"default": default_of(context), kernel.kernel_id: kernel.load(context, {})}
    best = dict.fromkeys(functions, math.inf)
    for _ in range(5):
        for name, function in functions.items():
            for _ in range(20):
                function(*arguments)
            torch.cuda.synchronize()
            start = perf_counter_ns()
            for _ in range(300):
                function(*arguments)
            best[name] = min(best[name], (perf_counter_ns() - start) / 300e3)
            torch.cuda.synchronize()
    print("\nhost: " + ", ".join(f"{name} {time:.1f} us" for name, time in best.items()))
