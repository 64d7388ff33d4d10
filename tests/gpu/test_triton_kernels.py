"""The Triton kernels compiled, over larger sizes, under capture and on other streams and devices.

tests/runtime/test_triton_kernels.py runs on the device too, where there is one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Rule
from layerzero_tune.measure.inputs import RandomTensors
from tests.runtime.kernel_calls import relative_error
from tests.runtime.test_kernels import named, named_with_dtypes
from tests.runtime.triton_calls import (
    IS_INTERPRETED,
    PAIRS,
    TRITON_KERNELS,
    any_size,
    attention_context,
    configurations,
    fault,
    linear_context,
    row_context,
)

pytestmark = pytest.mark.skipif(
    IS_INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device, and Triton without TRITON_INTERPRET"
)

ROW_SIZES = ((1, 4096), (77, 128), (513, 5120), (4096, 3072), (33, 14336), (7, 33333), (16384, 64))
ATTENTION_SIZES = (
    (1, 32, 8, 1, 131072, 128),
    (64, 32, 8, 1, 1111, 128),
    (3, 40, 8, 1, 4097, 96),
    (2, 16, 16, 4, 2000, 192),
    (2, 64, 8, 16, 777, 64),
    (1, 8, 1, 64, 9001, 256),
)

# Of a decode step and of a prefill, and with features that are no multiples of 16.
LINEAR_CALLS: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
    ((1, 4096, 14336), {"scale_x": "row", "scale_w": "row"}),
    ((512, 14336, 4096), {}),
    ((77, 4096, 6144), {"scale_x": "row", "scale_w": "row", "has_bias": True}),
    ((16, 8192, 1024), {"scale_w": "row", "has_bias": True}),
    ((2049, 5120, 3456), {"scale_x": "row"}),
    ((33, 1999, 777), {"scale_x": "row", "scale_w": "row", "has_bias": True}),
)


@pytest.fixture(autouse=True)
def _no_plain_launches() -> Iterator[None]:
    """Every kernel of these tests is started by its handles."""
    before = lz.stats().get("triton_plain_launches", 0)
    yield
    assert lz.stats().get("triton_plain_launches", 0) == before


def sized_contexts(operation: str, dtype: str) -> list[SelectionContext]:
    if operation.startswith("attention"):
        return [attention_context(operation, dtype, sizes) for sizes in ATTENTION_SIZES]
    if operation.startswith("linear"):
        return [linear_context(operation, dtype, sizes, **features) for sizes, features in LINEAR_CALLS]
    return [row_context(operation, dtype, *sizes) for sizes in ROW_SIZES]


def draw(context: SelectionContext, seed: int = 0) -> tuple[Any, ...]:
    operation = OPERATIONS[context.operation]
    return operation.arguments(context, RandomTensors("cuda", seed).draw(operation, context))


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("kernel", "operation", "dtype"), named_with_dtypes(PAIRS, ("float32", "float16", "bfloat16")))
def test_the_kernels_own_choice_is_right_at_every_size(kernel: Kernel, operation: str, dtype: str) -> None:
    for context in sized_contexts(operation, dtype):
        assert fault(kernel, {}, context) == "", context.to_dict()


@pytest.mark.parametrize(("kernel", "operation", "dtype"), named_with_dtypes(PAIRS, ("float32", "bfloat16")))
def test_configurations_of_the_space_load_and_are_right(kernel: Kernel, operation: str, dtype: str) -> None:
    """The space's restrictions keep out what the device's registers and shared memory would refuse."""
    chance = random.Random(0)
    for context in sized_contexts(operation, dtype):
        found = list(configurations(kernel, context))
        for configuration in chance.sample(found, min(2, len(found))):
            assert fault(kernel, configuration, context) == "", (configuration, context.to_dict())


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_largest_tiles_of_the_space_load(kernel: Kernel, operation: str) -> None:
    assert kernel.space is not None
    names = [name for name in kernel.space.parameters if name != "programs_per_multiprocessor"]
    for context in {any_size(found) for found in sized_contexts(operation, kernel.spec.dtypes[-1])}:
        valid = list(configurations(kernel, context))
        for leading in names:
            largest = max(valid, key=lambda found: (found[leading], [found[name] for name in names]))
            kernel.load(context, largest)


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
@pytest.mark.parametrize("misaligned", [False, True])
def test_the_first_call_can_be_captured_and_replays_on_new_values(
    kernel: Kernel, operation: str, misaligned: bool
) -> None:
    context = sized_contexts(operation, kernel.spec.dtypes[-1])[2]
    function = kernel.load(context, {})
    arguments = draw(context)
    if misaligned:
        arguments = tuple(map(_moved_by_one, arguments))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = as_tuple(function(*arguments))
    for seed in (1, 2):
        for given, fresh in zip(arguments, draw(context, seed), strict=True):
            if isinstance(given, torch.Tensor):
                given.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        again = as_tuple(function(*arguments))
        assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
        assert relative_error(again, _reference(context, arguments)) < 1e-2


def _moved_by_one(argument: Any) -> Any:
    """The same values at an address that is no multiple of 16."""
    if not isinstance(argument, torch.Tensor):
        return argument
    room = torch.empty(argument.numel() + 1, dtype=argument.dtype, device=argument.device)
    return room[1:].view(argument.shape).copy_(argument)


def _reference(context: SelectionContext, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    wide = (part.double() if isinstance(part, torch.Tensor) else part for part in arguments)
    return OPERATIONS[context.operation].reference(context, *wide)


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_a_call_runs_on_the_current_stream(kernel: Kernel, operation: str) -> None:
    context = sized_contexts(operation, kernel.spec.dtypes[-1])[0]
    function = kernel.load(context, {})
    arguments = draw(context)
    expected = as_tuple(function(*arguments))
    delayed = tuple(torch.zeros_like(part) if isinstance(part, torch.Tensor) else part for part in arguments)
    torch.cuda.synchronize()
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call] # tens of ms; a kernel on another stream would read the zeros
        for room, value in zip(delayed, arguments, strict=True):
            if isinstance(room, torch.Tensor):
                room.copy_(value)
        outputs = as_tuple(function(*delayed))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_a_call_runs_on_the_device_of_its_tensors(kernel: Kernel, operation: str) -> None:
    context = replace(sized_contexts(operation, kernel.spec.dtypes[-1])[1], device=detect_device("cuda:0"))
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


@pytest.mark.parametrize(
    ("kernel_id", "rows", "width"),
    [
        ("triton.rms_norm", 2**31 // 4096 + 3, 4096),
        ("triton.add_rms_norm", 2**31 // 128 + 3, 128),
        ("triton.layer_norm", 2**31 // 32768 + 3, 32768),
        ("triton.swiglu", 2**31 // 4096 + 3, 4096),
    ],
)
def test_more_elements_than_32_bits_count(kernel_id: str, rows: int, width: int) -> None:
    kernel = TRITON_KERNELS[kernel_id]
    context = row_context(kernel.spec.operations[0], "bfloat16", rows, width)
    arguments = draw(context)
    outputs = as_tuple(kernel.load(context, {})(*arguments))
    for part in (slice(0, 3), slice(-3, None)):
        few = tuple(a[part] if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in arguments)
        right = _reference(replace(context, rows=3), few)
        assert relative_error(tuple(output[part] for output in outputs), right) < 1e-2


def test_halves_further_apart_than_32_bits_count() -> None:
    both = torch.empty(3, 2**30 + 48, dtype=torch.bfloat16, device="cuda")
    gate, up = both[:, :4096], both[:, -4096:]
    gate.normal_()
    up.normal_()
    context = row_context("mlp.swiglu", "bfloat16", 3, 4096)
    output = TRITON_KERNELS["triton.swiglu"].load(context, {})(gate, up)
    assert relative_error((output,), _reference(context, (gate, up))) < 1e-2


def test_a_cache_longer_than_32_bits_count_is_read_to_its_end() -> None:
    kernel = TRITON_KERNELS["triton.split_kv"]
    context = attention_context("attention.cross", "bfloat16", (1, 2, 1, 1, 40, 64))
    query = torch.randn(1, 2, 1, 64, device="cuda", dtype=torch.bfloat16)
    # Keys 2^26 elements apart: the last of 40 lies beyond 2^31.
    room = torch.empty(40, 2**26, device="cuda", dtype=torch.bfloat16)
    key, value = room[None, None, :, :64], room[None, None, :, 64:128]
    key.normal_()
    value.normal_()
    arguments = (query, key, value, None, 0.0, None)
    output = kernel.load(context, {})(*arguments)
    assert relative_error((output,), _reference(context, arguments)) < 1e-2


def test_kernels_serve_public_calls_after_warmup() -> None:
    """Locked for a call, prepared by warmup, captured in a graph."""
    served: dict[str, Callable[[], Any]] = {
        "triton.rms_norm": lambda: lz.rms_norm(x, weight),
        "triton.swiglu": lambda: lz.swiglu(x, x),
        "triton.split_kv": lambda: lz.attention(query, key, key, enable_gqa=True),
    }
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(2, 2, 500, 64, device="cuda", dtype=torch.bfloat16)
    contexts = [
        lz.SelectionContext.from_tensors("norm.rms", x, weight, mode="graph"),
        lz.SelectionContext.from_tensors("mlp.swiglu", x, x, mode="graph"),
        lz.SelectionContext.from_tensors("attention.cross", query, key, key, mode="graph"),
    ]
    expected = [call() for call in served.values()]
    try:
        lz.set_policy(lz.Policy(locks=tuple(Rule(kernel=kernel_id) for kernel_id in served)))
        assert [plan.kernel_id for plan in lz.warmup(contexts)] == list(served)
        with torch.inference_mode():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = [call() for call in served.values()]
            graph.replay()
        torch.cuda.synchronize()
        for found, right in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    finally:
        lz.set_policy(None)
