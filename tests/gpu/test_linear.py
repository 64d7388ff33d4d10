"""Quantised linear layers on a CUDA device: torch's kernels at the sizes that it refuses, and the public functions.

tests/gpu/test_triton_kernels.py has the Triton kernels, tests/runtime/test_triton_linear.py runs on the device too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.policies.policy import Rule
from tests.runtime.kernel_calls import KERNELS, Call, quantised, relative_error
from tests.runtime.triton_calls import call_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = {"linear.fp8": "float8_e4m3fn", "linear.int8": "int8"}
PUBLIC: dict[str, Callable[..., torch.Tensor]] = {"linear.fp8": lz.linear_fp8, "linear.int8": lz.linear_int8}
each_operation = pytest.mark.parametrize("operation", DTYPES)
TORCH_KERNELS = [
    kernel
    for kernel in KERNELS.values()
    if kernel.spec.library == "torch" and "cuda" in kernel.spec.platforms and kernel.spec.operations[0] in DTYPES
]
each_torch_kernel = pytest.mark.parametrize("kernel", TORCH_KERNELS, ids=lambda kernel: kernel.kernel_id)


def linear_call(
    operation: str, rows: int, in_features: int, out_features: int, *, by_row: bool = True, has_bias: bool = True
) -> Call:
    torch.manual_seed(0)
    x, weight = (quantised((size, in_features), DTYPES[operation]).cuda() for size in (rows, out_features))
    scale_x, scale_w = (torch.rand((size, 1) if by_row else (), device="cuda") + 0.5 for size in (rows, out_features))
    bias = torch.randn(out_features, device="cuda").bfloat16() if has_bias else None
    return call_of(operation, x, weight, scale_x, scale_w, bias)


def assert_right(call: Call, output: torch.Tensor) -> None:
    assert (output.dtype, output.is_contiguous()) == (torch.bfloat16, True)
    assert relative_error((output,), call.reference()) < 1e-2


def skip_unless_accepted(kernel: Kernel, call: Call) -> None:
    if not call.accepts(kernel):
        pytest.skip(f"{kernel.kernel_id} is not for {detect_device('cuda').name}")


@each_torch_kernel
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_sizes_on_both_sides_of_torchs_limits_are_right(kernel: Kernel, by_row: bool, has_bias: bool) -> None:
    operation = kernel.spec.operations[0]
    for sizes in itertools.product((1, 2, 16, 17, 33), (1, 8, 15, 16, 24, 100, 128), (1, 8, 16, 17, 40, 128)):
        call = linear_call(operation, *sizes, by_row=by_row, has_bias=has_bias)
        skip_unless_accepted(kernel, call)
        [output] = call.run(kernel)
        if sizes[0] * sizes[2] >= 64:
            assert_right(call, output)


@each_torch_kernel
@pytest.mark.parametrize("sizes", [(0, 64, 48), (3, 0, 48), (3, 64, 0)])
@pytest.mark.parametrize("by_row", [False, True])
def test_products_without_elements_are_the_bias(kernel: Kernel, sizes: tuple[int, int, int], by_row: bool) -> None:
    rows, in_features, out_features = sizes
    operation, dtype = kernel.spec.operations[0], kernel.spec.dtypes[0]
    call = linear_call(operation, 3, 64, 48)
    skip_unless_accepted(kernel, call)
    x, weight = (quantised((size, in_features), dtype).cuda() for size in (rows, out_features))
    scales = [torch.rand((size, 1) if by_row else (), device="cuda") for size in (rows, out_features)]
    bias = torch.randn(out_features, device="cuda").bfloat16()
    output = kernel.load(call.context, {})(x, weight, *scales, bias)
    assert torch.equal(output, bias.expand(rows, out_features))


@each_torch_kernel
@pytest.mark.parametrize("mixed", [("row", "tensor"), ("tensor", "row")])
def test_one_scale_beside_one_per_row_is_right(kernel: Kernel, mixed: tuple[str, str]) -> None:
    call = linear_call(kernel.spec.operations[0], 40, 256, 512)
    skip_unless_accepted(kernel, call)
    x, weight, scale_x, scale_w, bias = call.arguments
    scale_x = scale_x if mixed[0] == "row" else scale_x[0, 0]
    scale_w = scale_w if mixed[1] == "row" else scale_w[0, 0]
    other = call_of(call.context.operation, x, weight, scale_x, scale_w, bias)
    assert (other.context.scale_x, other.context.scale_w) == mixed
    assert_right(other, other.run(kernel)[0])


@each_torch_kernel
@pytest.mark.parametrize("placement", ["transposed", "sliced", "strided"])
def test_matrices_that_are_not_dense_are_right(kernel: Kernel, placement: str) -> None:
    dtype = kernel.spec.dtypes[0]
    x, weight = (quantised((size, 160), dtype, placement) for size in (48, 96))
    # With the strides that they have: .cuda() would make them dense.
    moved = [
        part.new_empty(0)
        .set_(part.untyped_storage())
        .cuda()
        .as_strided(part.shape, part.stride(), part.storage_offset())
        for part in (x, weight)
    ]
    number = torch.tensor(0.5, device="cuda")
    call = call_of(kernel.spec.operations[0], *moved, number, number, None)
    skip_unless_accepted(kernel, call)
    assert not call.context.is_contiguous
    assert_right(call, call.run(kernel)[0])


@pytest.mark.parametrize("name", ["_scaled_mm", "_int_mm"])
def test_torch_still_refuses_what_is_padded_for_it(name: str) -> None:
    """Else the copies are not needed any more."""
    number = torch.tensor(1.0, device="cuda")

    def multiply(rows: int, in_features: int, out_features: int) -> torch.Tensor:
        dtype = torch.int8 if name == "_int_mm" else torch.float8_e4m3fn
        x, weight = (torch.zeros(size, in_features, device="cuda").to(dtype) for size in (rows, out_features))
        if name == "_int_mm":
            return torch._int_mm(x, weight.t())
        return torch._scaled_mm(x, weight.t(), number, number, out_dtype=torch.bfloat16)

    if name == "_scaled_mm" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs tensor cores for float8")
    inside, outside = (17, 8, 8), [(16, 8, 8), (17, 12, 8), (17, 8, 12)]
    if name == "_scaled_mm":
        inside, outside = (1, 16, 16), [(1, 24, 16), (1, 16, 24)]
    assert multiply(*inside).shape == (inside[0], inside[2])
    for sizes in outside:
        with pytest.raises(RuntimeError):
            multiply(*sizes)


@each_operation
def test_public_calls_are_right_and_served_by_themselves(operation: str) -> None:
    for rows in (1, 64, 1000):
        call = linear_call(operation, rows, 1024, 2048)
        for _ in range(3):
            assert_right(call, PUBLIC[operation](*call.arguments))


@each_operation
def test_the_triton_kernel_serves_after_warmup_and_under_capture(operation: str) -> None:
    kernel = KERNELS[operation.replace("linear.", "triton.linear_")]
    call = linear_call(operation, 24, 1024, 2048)
    skip_unless_accepted(kernel, call)
    context = lz.SelectionContext.from_tensors(operation, *call.arguments, mode="graph")
    try:
        lz.set_policy(lz.Policy(locks=(Rule(kernel=kernel.kernel_id),)))
        assert [plan.kernel_id for plan in lz.warmup([context])] == [kernel.kernel_id]
        captured: Any = None
        with torch.inference_mode():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = PUBLIC[operation](*call.arguments)
            graph.replay()
        torch.cuda.synchronize()
        assert_right(call, captured)
    finally:
        lz.set_policy(None)


def test_float8_products_keep_their_precision_over_many_features() -> None:
    """Tensor cores of sm_90 cut off what 14 bits do not hold, which shows where all products have one sign."""
    call = linear_call("linear.fp8", 64, 14336, 256, has_bias=False)
    x, weight, *rest = call.arguments
    positive = [part.float().abs().to(torch.float8_e4m3fn) for part in (x, weight)]
    call = call_of("linear.fp8", *positive, *rest)
    errors = {}
    for kernel_id in ("torch.scaled_mm", "triton.linear_fp8"):
        skip_unless_accepted(KERNELS[kernel_id], call)
        errors[kernel_id] = relative_error(call.run(KERNELS[kernel_id]), call.reference())
    assert errors["triton.linear_fp8"] <= 2.0 * errors["torch.scaled_mm"]


@pytest.mark.parametrize("kernel_id", ["triton.linear_fp8", "triton.linear_int8"])
def test_outputs_larger_than_32_bits_count_are_right_at_their_ends(kernel_id: str) -> None:
    kernel = KERNELS[kernel_id]
    operation, dtype = kernel.spec.operations[0], kernel.spec.dtypes[0]
    rows, width = 2**31 // 16384 + 5, 16384
    x, weight = (quantised((size, 32), dtype).cuda() for size in (rows, width))
    scale = torch.rand(rows, 1, device="cuda") + 0.5
    number = torch.tensor(0.5, device="cuda")
    call = call_of(operation, x, weight, scale, number, None)
    skip_unless_accepted(kernel, call)
    [output] = call.run(kernel)
    for part in (slice(0, 3), slice(-3, None)):
        few = call_of(operation, x[part], weight, scale[part], number, None)
        assert relative_error((output[part],), few.reference()) < 1e-2
