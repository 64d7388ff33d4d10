"""Norms and activations of other libraries on a CUDA device: right just inside their limits, in captures, on streams.

What happens just outside the limits is printed (`pytest -s`), as the evidence for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement, unfit_version
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Rule
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.measure.correctness import Check, judge, tolerances
from layerzero_tune.measure.inputs import RandomTensors
from tests.runtime.kernel_calls import KERNELS, relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


def is_installed(kernel: Kernel) -> bool:
    spec = kernel.spec
    return missing_requirement(spec.requires) is None and unfit_version(spec.library, spec.min_version) is None


ROW_OPERATIONS = ("norm.rms", "norm.add_rms", "norm.layer", "mlp.swiglu", "mlp.geglu")
DEFAULTS = {OPERATIONS[operation].default_kernel for operation in ROW_OPERATIONS}
# Triton kernels of our own have tests of their own.
ADAPTERS = [
    kernel
    for kernel_id, kernel in KERNELS.items()
    if kernel.spec.operations[0] in ROW_OPERATIONS
    and "cuda" in kernel.spec.platforms
    and kernel.spec.library != "triton"
    and kernel_id not in DEFAULTS
]
EACH = [
    pytest.param(
        kernel,
        id=kernel.kernel_id,
        marks=pytest.mark.skipif(not is_installed(kernel), reason=f"{kernel.spec.library} is not installed"),
    )
    for kernel in ADAPTERS
]
BY_ID = {str(param.id): param for param in EACH}
DTYPES = ("bfloat16", "float16", "float32")
# (rows, width): one row, several, widths that 16, 8 and 2 divide and odd ones, narrow and wide.
SIZES = ((1, 4096), (7, 130), (33, 14336), (513, 5120), (2048, 3072), (3, 1999), (40000, 128), (40001, 64), (5, 8))
# Libraries that compile for a width take half a second for each: other dtypes have fewer.
FEW_SIZES = SIZES[:3]
# How a matrix of rows lies in memory.
LAYOUTS = ("contiguous", "row_slices", "strided", "transposed", "odd_address")


def context_of(kernel: Kernel, dtype: str, rows: int, width: int, **fields: Any) -> SelectionContext:
    """That of a call which the kernel accepts but for its sizes."""
    operation = kernel.spec.operations[0]
    fields = {
        "has_bias": operation == "norm.layer",
        "approximate": "tanh" if operation == "mlp.geglu" else "none",
        "weight_dtype": "float32" if kernel.kernel_id == "flashinfer.layer_norm" else dtype,
        **fields,
    }
    device = detect_device("cuda")
    return SelectionContext(operation=operation, dtype=dtype, rows=rows, hidden_size=width, device=device, **fields)


def accepts(kernel: Kernel, context: SelectionContext) -> bool:
    return not rejections(kernel.spec.limits, context)


def fault(kernel: Kernel, context: SelectionContext, seed: int = 0) -> str:
    """What the tuner finds wrong with the kernel's result; "" for a right one.

    Twice the error of the default counts as right; where torch's own cannot serve the call, that of rows in the
    weight's dtype.
    """
    operation = OPERATIONS[context.operation]
    check = Check.prepare(operation, context, RandomTensors("cuda", seed), seed)
    default = check.run(default_of(context))
    return judge(check.run(kernel.load(context, {})), tolerances(default, context.result_dtype)).message


def default_of(context: SelectionContext) -> Any:
    function = KERNELS[OPERATIONS[context.operation].default_kernel].load(context, {})
    if context.operation != "norm.layer" or context.mixed_weight_dtype is None:
        return function

    def in_one_dtype(x: torch.Tensor, *others: Any) -> torch.Tensor:
        # torch's refuses another dtype of the weight on CUDA devices.
        alike = (part.to(x.dtype) if isinstance(part, torch.Tensor) else part for part in others)
        output: torch.Tensor = function(x, *alike)
        return output

    return in_one_dtype


def draw(context: SelectionContext, seed: int = 0) -> tuple[Any, ...]:
    operation = OPERATIONS[context.operation]
    return operation.arguments(context, RandomTensors("cuda", seed).draw(operation, context))


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def reference(context: SelectionContext, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    wide = (part.double() if isinstance(part, torch.Tensor) else part for part in arguments)
    return OPERATIONS[context.operation].reference(context, *wide)


def bound(kernel: Kernel, field: str) -> int:
    return min(int(limit.bound) for limit in kernel.spec.limits if limit.field == field and limit.kind == "at_most")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", EACH)
def test_it_is_right_at_every_size_that_it_accepts(kernel: Kernel, dtype: str) -> None:
    if dtype not in kernel.spec.dtypes:
        pytest.skip(f"takes {', '.join(kernel.spec.dtypes)}")
    sizes = SIZES if dtype == "bfloat16" else FEW_SIZES
    found = [context for one in sizes if accepts(kernel, context := context_of(kernel, dtype, *one))]
    assert len(found) >= len(sizes) - 1
    for context in found:
        assert fault(kernel, context) == "", context.to_dict()


FEATURES = (
    {"weight_dtype": "float32"},
    {"weight_dtype": "bfloat16"},
    {"has_weight": False, "has_bias": False},
    {"has_bias": False},
    {"offset": 1.0},
    {"offset": 0.5},
    {"offset": 1.0, "weight_dtype": "float32"},
    {"offset": 1.0, "has_weight": False},
)


@pytest.mark.parametrize("kernel", EACH)
def test_it_is_right_with_every_feature_that_it_accepts(kernel: Kernel) -> None:
    if not kernel.spec.operations[0].startswith("norm"):
        pytest.skip("activations have none")
    checked = 0
    for fields in FEATURES:
        if "offset" in fields and kernel.spec.operations != ("norm.rms",):
            continue
        for dtype in DTYPES if fields in FEATURES[:2] else DTYPES[:1]:
            context = context_of(kernel, dtype, 65, 1030, **fields)
            if accepts(kernel, context):
                assert fault(kernel, context) == "", context.to_dict()
                checked += 1
    assert checked


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.3])
@pytest.mark.parametrize("kernel", EACH)
def test_eps_counts(kernel: Kernel, eps: float) -> None:
    if not kernel.spec.operations[0].startswith("norm"):
        pytest.skip("activations have none")
    context = context_of(kernel, "bfloat16", 9, 512)
    arguments = list(draw(context))
    arguments[0] = arguments[0] * 1e-3  # so small that eps decides
    if context.operation == "norm.add_rms":
        arguments[1] = arguments[1] * 1e-3
    place = next(at for at, part in enumerate(arguments) if isinstance(part, float))
    arguments[place] = eps
    outputs = as_tuple(kernel.load(context, {})(*arguments))
    assert relative_error(outputs, reference(context, tuple(arguments))) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", EACH)
def test_rows_in_any_layout_that_it_accepts_give_right_results(kernel: Kernel, layout: str) -> None:
    dtype, rows, width = "bfloat16", 24, 512
    context = context_of(kernel, dtype, rows, width)
    arguments = tuple(laid_out(part, layout) if is_matrix(part) else part for part in draw(context))
    features = {"approximate": "tanh"} if context.operation == "mlp.geglu" else {}
    described = OPERATIONS[context.operation].describe(*arguments, **features)
    if not accepts(kernel, described):
        assert not described.is_contiguous
        pytest.skip("refused by its limits")
    outputs = as_tuple(kernel.load(described, {})(*arguments))
    assert all(output.shape == (rows, width) for output in outputs)
    # torch's own keep the layout of what they are given.
    assert kernel.spec.library == "torch" or all(output.is_contiguous() for output in outputs)
    assert relative_error(outputs, reference(described, arguments)) < 1e-2


def is_matrix(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dim() > 1


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    rows, width = tensor.shape
    room = torch.empty(2 * rows * width + 1, dtype=tensor.dtype, device=tensor.device)
    views = {
        "contiguous": room[: rows * width].view(rows, width),
        "row_slices": room[: 2 * rows * width].view(rows, 2 * width)[:, 3 : width + 3],
        "strided": room[: 2 * rows * width].view(rows, 2 * width)[:, ::2],
        "transposed": room[: rows * width].view(width, rows).t(),
        "odd_address": room[1 : rows * width + 1].view(rows, width),
    }
    return views[layout].copy_(tensor)


@pytest.mark.parametrize("shape", [(512,), (1, 1, 512), (2, 3, 5, 512)])
@pytest.mark.parametrize("kernel", EACH)
def test_any_leading_dimensions_are_rows(kernel: Kernel, shape: tuple[int, ...]) -> None:
    context = context_of(kernel, "bfloat16", math.prod(shape[:-1]), shape[-1])
    arguments = tuple(part.reshape(shape) if is_matrix(part) else part for part in draw(context))
    outputs = as_tuple(kernel.load(context, {})(*arguments))
    assert all(output.shape == shape for output in outputs)
    assert relative_error(outputs, reference(context, arguments)) < 1e-2


@pytest.mark.parametrize("kernel", EACH)
def test_the_widest_rows_that_it_accepts_are_right(kernel: Kernel) -> None:
    width = 65536 if kernel.spec.library == "torch" else bound(kernel, "hidden_size")
    for dtype in kernel.spec.dtypes:
        if dtype in DTYPES:
            for columns in (width, width - 2):
                context = context_of(kernel, dtype, 5, columns)
                assert accepts(kernel, context)
                assert fault(kernel, context) == "", context.to_dict()


@pytest.mark.parametrize("kernel", EACH)
def test_more_elements_than_31_bits_count_are_right(kernel: Kernel) -> None:
    """Up to the most rows that it accepts, where these fit into memory."""
    operation = kernel.spec.operations[0]
    tensors = {"norm.add_rms": 4}.get(operation, 3 if operation.startswith("mlp") else 2)
    rows, width = 2**31 // 4096 + 8, 4096
    if kernel.spec.library == "flashinfer-python":
        rows, width = bound(kernel, "rows"), bound(kernel, "hidden_size")
    needed = tensors * rows * width * 2 + 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    context = context_of(kernel, "bfloat16", rows, width)
    assert accepts(kernel, context)
    arguments = repeated(context, rows)
    outputs = as_tuple(kernel.load(context, {})(*arguments))
    for part in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(-3, None)):
        few = tuple(a[part] if is_matrix(a) else a for a in arguments)
        assert relative_error(tuple(output[part] for output in outputs), reference(context, few)) < 1e-2
    del outputs, arguments
    torch.cuda.empty_cache()


def repeated(context: SelectionContext, rows: int) -> tuple[Any, ...]:
    """Arguments of so many rows, of which every 1,021st is alike."""
    few = draw(replace(context, rows=1021))
    index = torch.arange(rows, device="cuda") % 1021
    return tuple(part[index] if is_matrix(part) else part for part in few)


# (kernel, what is just outside)
OUTSIDE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("liger.rms_norm", {"width": 65537}),
    ("liger.add_rms_norm", {"width": 65537}),
    ("liger.add_rms_norm", {"has_weight": False}),
    ("liger.layer_norm", {"has_bias": False}),
    ("liger.swiglu", {"width": 65537}),
    ("quack.rms_norm", {"width": 131}),
    ("quack.rms_norm", {"width": 131, "dtype": "float32"}),
    ("quack.rms_norm", {"width": 65538}),
    ("quack.rms_norm", {"width": 131072}),
    ("quack.add_rms_norm", {"width": 32768}),
    ("quack.add_rms_norm", {"width": 32768, "dtype": "float32"}),
    ("quack.layer_norm", {"width": 131}),
    ("quack.layer_norm", {"width": 131072}),
    ("quack.layer_norm", {"has_weight": False}),
    ("flashinfer.rms_norm", {"width": 16400}),
    ("flashinfer.rms_norm", {"dtype": "float32"}),
    ("flashinfer.rms_norm", {"weight_dtype": "float32"}),
    ("flashinfer.rms_norm", {"offset": 0.5}),
    ("flashinfer.layer_norm", {"weight_dtype": "bfloat16"}),
    ("flashinfer.layer_norm", {"dtype": "float16", "weight_dtype": "float32"}),
    ("flashinfer.layer_norm", {"width": 16400}),
    ("torch.rms_norm.fused_cuda", {"weight_dtype": "float32"}),
    ("torch.layer_norm.native", {"weight_dtype": "float32"}),
)


@pytest.mark.parametrize(
    ("kernel_id", "outside"),
    [pytest.param(*case, marks=BY_ID[case[0]].marks, id=f"{case[0]}-{case[1]}") for case in OUTSIDE],
)
def test_what_happens_just_outside_the_limits_is_printed(kernel_id: str, outside: dict[str, Any]) -> None:
    kernel = KERNELS[kernel_id]
    fields = {"dtype": "bfloat16", "rows": 5, "width": 512, **outside}
    context = context_of(kernel, fields.pop("dtype"), fields.pop("rows"), fields.pop("width"), **fields)
    assert not accepts(kernel, context)
    try:
        found = fault(kernel, context) or "right"
    except Exception as error:  # noqa: BLE001 - whatever the library does there
        found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    torch.cuda.synchronize()
    print(f"\noutside: {kernel_id} {outside}: {found[:300]}")


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
    vector = weight[0].float() if kernel.kernel_id == "flashinfer.layer_norm" else weight[0]
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
    from time import perf_counter_ns

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
