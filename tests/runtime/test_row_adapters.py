"""Adapters of other libraries' norms and activations on the CPU, over stand-ins of the libraries.

tests/gpu/test_row_adapters.py runs the libraries themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from hypothesis import HealthCheck, given, settings

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import library_calls, liger
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from tests.runtime.kernel_calls import KERNELS, Call, assert_close_to_reference, calls, is_floating
from tests.runtime.row_libraries import Recorder, stand_ins
from tests.runtime.test_kernels import named

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
A100 = DeviceSpec(platform="cuda", name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), multiprocessors=108)
ADAPTERS = {
    kernel_id: kernel
    for kernel_id, kernel in KERNELS.items()
    if kernel_id.startswith(("liger.", "quack.", "flashinfer."))
    and kernel.spec.operations[0].startswith(("norm", "mlp"))
}
BINDINGS = {name: KERNELS[name] for name in ("torch.rms_norm.fused_cuda", "torch.add_rms_norm.fused_cuda")} | {
    "torch.layer_norm.native": KERNELS["torch.layer_norm.native"]
}
PAIRS = [(kernel, kernel.spec.operations[0]) for kernel in (*ADAPTERS.values(), *BINDINGS.values())]
# Those that compile for each size.
BY_SIZE = {name: kernel for name, kernel in ADAPTERS.items() if not name.startswith("flashinfer.")}


@pytest.fixture(autouse=True, scope="module")
def _recorder() -> Iterator[Recorder]:
    with stand_ins() as recorder:
        yield recorder


@pytest.fixture
def recorder(_recorder: Recorder) -> Recorder:
    _recorder.calls.clear()
    return _recorder


def with_dtypes(pairs: list[tuple[Kernel, str]]) -> list[ParameterSet]:
    return [
        pytest.param(kernel, operation, dtype, id=f"{kernel.kernel_id}-{dtype}")
        for kernel, operation in pairs
        for dtype in ("float32", "float16", "bfloat16")
        if dtype in kernel.spec.dtypes
    ]


def on_gpu(call: Call) -> Call:
    """The call as one for an H100, its tensors on the CPU all the same."""
    return Call(replace(call.context, device=H100), call.arguments)


def usual_call(kernel: Kernel, dtype: str = "bfloat16", shape: tuple[int, ...] = (33, 130)) -> Call:
    """One that the kernel accepts, on contiguous tensors of this shape."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x, other = (torch.randn(shape).to(kind) for _ in range(2))
    weight = (torch.randn(shape[-1]) * 0.1 + 1.0).to(kind)
    operation = kernel.spec.operations[0]
    arguments = {
        "norm.rms": (x, weight, 1e-6, 0.0),
        "norm.add_rms": (x, other, weight, 1e-6),
        "norm.layer": (x, weight, weight + 1, 1e-5),
    }.get(operation, (x, other))
    features = {"approximate": "tanh"} if operation == "mlp.geglu" else {}
    call = on_gpu(Call(OPERATIONS[operation].describe(*arguments, **features), arguments))
    assert call.accepts(kernel)
    return call


def usual_context(kernel_id: str, **changes: Any) -> SelectionContext:
    return replace(usual_call(KERNELS[kernel_id]).context, **changes)


@pytest.mark.parametrize(("kernel", "operation", "dtype"), with_dtypes(PAIRS))
def test_accepted_calls_agree_with_the_reference(kernel: Kernel, operation: str, dtype: str) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(calls(operation, dtype).map(on_gpu).filter(lambda call: call.accepts(kernel)))
    def agrees(call: Call) -> None:
        assert_close_to_reference(call, kernel)

    agrees()


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
@pytest.mark.parametrize("shape", [(16,), (1, 64), (7, 1000), (2, 3, 5, 130), (513, 8)])
def test_every_shape_of_rows_agrees(kernel: Kernel, operation: str, shape: tuple[int, ...]) -> None:
    call = usual_call(kernel, shape=shape)
    outputs = call.run(kernel)
    assert all(output.shape == shape and output.dtype == torch.bfloat16 for output in outputs)
    assert relative(outputs, call) < 8e-3


def relative(outputs: tuple[torch.Tensor, ...], call: Call) -> float:
    pairs = zip(outputs, call.reference(), strict=True)
    return max(float((output.double() - exact).norm() / exact.norm()) for output, exact in pairs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("kernel_id", ["liger.rms_norm", "quack.rms_norm", "flashinfer.rms_norm"])
def test_offsets_and_eps_reach_the_library(kernel_id: str, eps: float, offset: float) -> None:
    kernel = KERNELS[kernel_id]
    x, weight, *_ = usual_call(kernel).arguments
    arguments = (x, weight, eps, offset)
    call = on_gpu(Call(OPERATIONS["norm.rms"].describe(*arguments), arguments))
    assert call.accepts(kernel)
    assert_close_to_reference(call, kernel)


@pytest.mark.parametrize("kernel_id", ["liger.rms_norm", "quack.rms_norm"])
def test_an_offset_without_a_weight_adds_nothing(kernel_id: str) -> None:
    x = usual_call(KERNELS[kernel_id]).arguments[0]
    arguments = (x, None, 1e-6, 1.0)
    call = on_gpu(Call(OPERATIONS["norm.rms"].describe(*arguments), arguments))
    assert call.accepts(KERNELS[kernel_id])
    assert_close_to_reference(call, KERNELS[kernel_id])


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_arguments_stay_as_they_were_and_results_are_memory_of_their_own(kernel: Kernel, operation: str) -> None:
    call = usual_call(kernel)
    tensors = [part for part in call.arguments if is_floating(part)]
    before = [part.clone() for part in tensors]
    outputs = call.run(kernel)
    assert all(torch.equal(part, old) for part, old in zip(tensors, before, strict=True))
    places = [part.untyped_storage().data_ptr() for part in (*tensors, *outputs)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(("kernel", "operation"), named([pair for pair in PAIRS if pair[0].kernel_id in ADAPTERS]))
def test_tensors_at_odd_addresses_agree(kernel: Kernel, operation: str) -> None:
    call = usual_call(kernel)
    arguments = tuple(moved_by_one(part) if is_floating(part) else part for part in call.arguments)
    assert relative(Call(call.context, arguments).run(kernel), call) < 8e-3


def moved_by_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of 16."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = room[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16
    return moved


# (what is changed of a usual call, the limit that then refuses it)
INSIDE_AND_OUTSIDE = [
    ("liger.rms_norm", {"hidden_size": 65536}, {"hidden_size": 65537}, "HIDDEN_SIZE_NOT_AT_MOST"),
    ("liger.rms_norm", {"rows": 2**31 - 1}, {"rows": 2**31}, "ROWS_NOT_AT_MOST"),
    ("liger.rms_norm", {"has_weight": False}, {"is_contiguous": False}, "IS_CONTIGUOUS_NOT_ONE_OF"),
    ("liger.add_rms_norm", {"weight_dtype": "float32"}, {"has_weight": False}, "HAS_WEIGHT_NOT_ONE_OF"),
    ("liger.layer_norm", {"has_bias": True}, {"has_bias": False}, "HAS_BIAS_NOT_ONE_OF"),
    ("liger.swiglu", {"hidden_size": 65536}, {"hidden_size": 65537}, "HIDDEN_SIZE_NOT_AT_MOST"),
    ("liger.geglu", {"approximate": "tanh"}, {"approximate": "none"}, "APPROXIMATE_NOT_ONE_OF"),
    ("liger.swiglu", {"requires_grad": False}, {"requires_grad": True}, "REQUIRES_GRAD_NOT_ONE_OF"),
    ("quack.rms_norm", {"hidden_size": 65536}, {"hidden_size": 65538}, "HIDDEN_SIZE_NOT_AT_MOST"),
    ("quack.rms_norm", {"hidden_size": 130}, {"hidden_size": 131}, "HIDDEN_SIZE_NOT_MULTIPLE_OF"),
    ("quack.rms_norm", {"device": H100}, {"device": A100}, "SM_NOT_AT_LEAST"),
    ("quack.add_rms_norm", {"hidden_size": 16384}, {"hidden_size": 16386}, "HIDDEN_SIZE_NOT_AT_MOST"),
    ("quack.layer_norm", {"has_bias": False}, {"has_weight": False}, "HAS_WEIGHT_NOT_ONE_OF"),
    ("flashinfer.rms_norm", {"offset": 1.0}, {"offset": 0.5}, "OFFSET_NOT_ONE_OF"),
    ("flashinfer.rms_norm", {"dtype": "float16", "weight_dtype": "float16"}, {"dtype": "float32"}, "DTYPE_NOT_ONE_OF"),
    ("flashinfer.rms_norm", {"rows": 2**18}, {"rows": 2**18 + 1}, "ROWS_NOT_AT_MOST"),
    (
        "flashinfer.rms_norm",
        {"hidden_size": 2**14},
        {"weight_dtype": "float32"},
        "MIXED_WEIGHT_DTYPE_NOT_ONE_OF",
    ),
    ("torch.rms_norm.fused_cuda", {"offset": 0.5}, {"weight_dtype": "float32"}, "MIXED_WEIGHT_DTYPE_NOT_ONE_OF"),
    ("torch.layer_norm.native", {"has_bias": False}, {"weight_dtype": "float32"}, "MIXED_WEIGHT_DTYPE_NOT_ONE_OF"),
]


@pytest.mark.parametrize(("kernel_id", "inside", "outside", "code"), INSIDE_AND_OUTSIDE)
def test_limits_hold_just_inside_and_just_outside(
    kernel_id: str, inside: dict[str, Any], outside: dict[str, Any], code: str
) -> None:
    limits = KERNELS[kernel_id].spec.limits
    assert rejections(limits, usual_context(kernel_id, **inside)) == ()
    assert code in [rejection.code for rejection in rejections(limits, usual_context(kernel_id, **outside))]


def test_elements_within_the_limits_of_flashinfer_can_be_numbered_in_32_bits() -> None:
    limits = KERNELS["flashinfer.rms_norm"].spec.limits
    bounds = {limit.field: limit.bound for limit in limits if limit.kind == "at_most"}
    assert bounds["rows"] * bounds["hidden_size"] <= 2**32


def test_flashinfer_launches_early_where_the_device_can(recorder: Recorder) -> None:
    kernel = KERNELS["flashinfer.rms_norm"]
    call = usual_call(kernel)
    for device, early in ((H100, True), (A100, False)):
        kernel.load(replace(call.context, device=device), {})(*call.arguments)
        assert recorder.calls[-1][1][4] is early


# Compiling, captures and devices.


@pytest.mark.parametrize("kernel_id", BY_SIZE)
def test_a_captured_call_that_is_not_compiled_yet_goes_to_the_default(
    kernel_id: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KERNELS[kernel_id]
    known, unknown = usual_call(kernel), usual_call(kernel, shape=(9, 256))
    function = kernel.load(known.context, {})
    function(*known.arguments)
    assert len(recorder.calls) == 1
    counted = lz.stats().get("not_compiled_in_capture", 0)
    monkeypatch.setattr(library_calls, "is_capturing", lambda: True)
    function(*known.arguments)
    assert len(recorder.calls) == 2
    expected = unknown.run(unknown.default())
    outputs = function(*unknown.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert len(recorder.calls) == 2
    assert lz.stats()["not_compiled_in_capture"] == counted + 1
    # It does not count as compiled.
    function(*unknown.arguments)
    assert len(recorder.calls) == 2
    monkeypatch.setattr(library_calls, "is_capturing", lambda: False)
    function(*unknown.arguments)
    assert len(recorder.calls) == 3


def test_a_call_that_fails_counts_as_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    call = usual_call(KERNELS["liger.swiglu"])
    failing = iter((True, False))

    def library(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if next(failing):
            raise RuntimeError("no memory to compile in")
        return gate

    function = library_calls.guarded("liger.swiglu", library, lambda gate, up: gate.shape[-1], call.context)
    with pytest.raises(RuntimeError, match="no memory"):
        function(*call.arguments)
    monkeypatch.setattr(library_calls, "is_capturing", lambda: True)
    assert function(*call.arguments) is not call.arguments[0]


@pytest.mark.parametrize("kernel_id", [name for name in ADAPTERS if name.startswith("liger.")])
def test_liger_compiles_for_blocks_widths_and_alignments_but_not_for_rows(
    kernel_id: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KERNELS[kernel_id]
    call = usual_call(kernel)
    function = kernel.load(call.context, {})
    function(*call.arguments)
    monkeypatch.setattr(library_calls, "is_capturing", lambda: True)

    def is_compiled(arguments: tuple[Any, ...]) -> bool:
        before = len(recorder.calls)
        function(*arguments)
        return len(recorder.calls) > before

    assert is_compiled(usual_call(kernel, shape=(3, 48, 130)).arguments)
    # Of activations the width is a constant, of norms the block and what 16 divides.
    assert is_compiled(usual_call(kernel, shape=(33, 250)).arguments) == kernel_id.endswith("norm")
    assert not any(is_compiled(usual_call(kernel, shape=(33, width)).arguments) for width in (126, 144, 258))
    for place, part in enumerate(call.arguments):
        if is_floating(part):
            moved = (*call.arguments[:place], moved_by_one(part), *call.arguments[place + 1 :])
            assert not is_compiled(moved), place


@pytest.mark.parametrize("rows", [32767, 32768, 32769, 40000])
@pytest.mark.parametrize("width", [256, 257])
def test_the_forms_of_ligers_rms_norm_tell_its_kernel_for_blocks_of_rows_apart(rows: int, width: int) -> None:
    """Which its grid, and whether 16 divides the number of rows, decide."""
    x = torch.empty(1).expand(rows, width)
    few = torch.empty(1).expand(1, width)
    takes_blocks = rows >= 32768 and width <= 256
    assert (liger._rms_form(x, None, 1e-6, 0.0) != liger._rms_form(few, None, 1e-6, 0.0)) == takes_blocks
    others = {liger._rms_form(torch.empty(1).expand(32768 + 16 * n, width), None, 1e-6, 0.0) for n in range(3)}
    assert len(others) == 1
    assert (liger._rms_form(x, None, 1e-6, 0.0) in others) == ((rows % 16 == 0) if takes_blocks else width > 256)


def test_the_default_of_every_adapter_is_that_of_its_operation() -> None:
    for kernel, operation in PAIRS:
        call = usual_call(kernel)
        default = library_calls._default_function(call.context)
        assert default.__module__ == KERNELS[OPERATIONS[operation].default_kernel].load.__module__
