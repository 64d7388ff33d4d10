"""Quantised linear layers: contexts of calls, and torch's kernels at their limits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ContextError, ContextTypeError, NoKernelAvailableError
from layerzero_runtime.kernels.torch_linear import MAX_INT8_FEATURES
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.workload.lines import parse_workload
from tests.runtime.kernel_calls import KERNELS, quantised, relative_error
from tests.runtime.linear_examples import DTYPES, assert_right, call_of, each_operation

OLDER_GPU = DeviceSpec(platform="cuda", name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), multiprocessors=108)
H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)


def test_a_line_of_a_workload_needs_no_more_than_the_sizes() -> None:
    """The example of the design."""
    text = (
        '{"operation": "linear.fp8", "dtype": "float8_e4m3fn", "mode": "graph", '
        '"rows": 512, "in_features": 4096, "out_features": 14336}'
    )
    [line] = parse_workload(text, "example")
    context = line.context
    OPERATIONS["linear.fp8"].validate(context)
    assert (context.output_dtype, context.scale_x, context.scale_w, context.has_bias) == (
        "bfloat16",
        "tensor",
        "tensor",
        False,
    )
    assert OPERATIONS["linear.fp8"].sizes(context) == (512, 4096, 14336)
    assert OPERATIONS["linear.fp8"].flops(context) == 2 * 512 * 4096 * 14336
    assert context.to_dict() == json.loads(text)


@each_operation
def test_features_are_read_off_the_tensors(operation: str) -> None:
    call = call_of(operation, (2, 3), 40, 24, scale_x=torch.ones(2, 3, 1), bias=torch.zeros(24).bfloat16())
    context = call.context
    assert (context.rows, context.in_features, context.out_features) == (6, 40, 24)
    assert (context.scale_x, context.scale_w, context.has_bias) == ("row", "tensor", True)
    assert (context.dtype, context.output_dtype, context.other_output_dtype) == (DTYPES[operation], "bfloat16", None)
    key = OPERATIONS[operation].static_key(context)
    assert key == ("eager", DTYPES[operation], "row", "tensor", True, ())


@pytest.mark.parametrize(
    ("leading", "scale", "scaling"),
    [
        ((6,), (), "tensor"),
        ((6,), (1,), "tensor"),
        ((6,), (1, 1), "tensor"),
        ((6,), (6, 1), "row"),
        ((6,), (6,), "row"),
        ((2, 3), (2, 3, 1), "row"),
        ((2, 3), (2, 3), "row"),
        ((), (), "tensor"),
        ((), (1,), "tensor"),
        # Of a single row only the trailing 1 tells.
        ((1,), (1, 1), "row"),
        ((1,), (1,), "tensor"),
        ((1, 1), (1, 1, 1), "row"),
    ],
)
def test_the_shape_of_a_scale_says_what_it_scales(
    leading: tuple[int, ...], scale: tuple[int, ...], scaling: str
) -> None:
    call = call_of("linear.fp8", leading, scale_x=torch.rand(scale) + 0.5)
    assert call.context.scale_x == scaling
    assert_right(call, lz.linear_fp8(*call.arguments))


X, W, S = quantised((6, 64), "float8_e4m3fn"), quantised((48, 64), "float8_e4m3fn"), torch.tensor(1.0)


@pytest.mark.scenario("EC-013")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, W[:, :32], S, S), r"weight has shape \(48, 32\), required \(out_features, 64\)"),
        ((X, W[0], S, S), r"weight has shape \(64,\), required \(out_features, 64\)"),
        ((X, W.to(torch.float8_e5m2), S, S), "dtypes differ: x float8_e4m3fn, weight float8_e5m2"),
        ((X, W, S.double(), S), "scale_x is float64, required float32"),
        ((X, W, S, S.half()), "scale_w is float16, required float32"),
        ((X, W, torch.ones(5, 1), S), r"scale_x has shape \(5, 1\), required one element, .*: \(6, 1\) or \(6,\)"),
        ((X, W, S, torch.ones(1, 48)), r"scale_w has shape \(1, 48\), required .*: \(48, 1\) or \(48,\)"),
        ((X, W, S, S, torch.zeros(48)), "bias is float32, required bfloat16"),
        ((X, W, S, S, torch.zeros(1, 48).bfloat16()), r"bias has shape \(1, 48\), required \(48,\)"),
        ((X, W.to("meta"), S, S), "different devices: x cpu, weight meta"),
        ((X, W, S, S.to("meta")), "different devices: .*scale_w meta"),
        ((X[0, 0], W, S, S), "no dimension"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    lz.linear_fp8(X, W, S, S)  # so that a fast path is there to be taken wrongly
    with pytest.raises(ContextError, match=message):
        lz.linear_fp8(*arguments)


@pytest.mark.parametrize("other", [1.0, [1.0], None])
def test_what_is_no_tensor_is_refused(other: Any) -> None:
    with pytest.raises(ContextTypeError, match="scale_x must be a tensor, not "):
        lz.linear_fp8(X, W, other, S)


def test_matrices_of_other_dtypes_have_no_kernel() -> None:
    with pytest.raises(NoKernelAvailableError, match="DTYPE_NOT_ONE_OF: dtype is 'float8_e5m2'"):
        lz.linear_fp8(X.to(torch.float8_e5m2), W.to(torch.float8_e5m2), S, S)
    with pytest.raises(NoKernelAvailableError, match="DTYPE_NOT_ONE_OF: dtype is 'float8_e4m3fn'"):
        lz.linear_int8(X, W, S, S)


# Kernels.


@each_operation
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 1, 1), (1, 70, 5), (5, 1, 72), (9, 70, 1)])
def test_single_rows_and_features_are_right_at_any_strides(
    operation: str, rows: int, in_features: int, out_features: int
) -> None:
    """torch._int_mm reads beside matrices whose strides are those of transposed columns."""
    placements = ("contiguous", "transposed", "sliced", "strided")
    for x, weight in itertools.product(placements, placements):
        call = call_of(
            operation,
            x=quantised((rows, in_features), DTYPES[operation], x),
            weight=quantised((out_features, in_features), DTYPES[operation], weight),
        )
        for kernel in KERNELS.values():
            if call.accepts(kernel):
                assert relative_error(call.run(kernel), call.reference()) < 1e-2, (kernel.kernel_id, x, weight)


def test_sums_beyond_int32_are_left_to_a_wider_product() -> None:
    features = MAX_INT8_FEATURES + 1
    x = torch.full((1, features), -128, dtype=torch.int8)
    call = call_of("linear.int8", x=x, weight=x)
    assert int(torch._int_mm(x, x.t())) < 0  # an overflow
    assert [str(reason) for reason in rejections(KERNELS["torch.int_mm"].spec.limits, call.context)] == [
        "IN_FEATURES_NOT_AT_MOST: in_features is 131072, required <= 131071"
    ]
    torch.testing.assert_close(lz.linear_int8(*call.arguments).double(), call.reference()[0], rtol=5e-3, atol=0)


def test_devices_without_float8_get_the_wider_product() -> None:
    context = call_of("linear.fp8").context
    for device, kernel_id in ((OLDER_GPU, "torch.linear_fp8.widened"), (H100, "torch.scaled_mm")):
        assert lz.select(context.with_device(device)).kernel_id == kernel_id
    refused = rejections(KERNELS["torch.scaled_mm"].spec.limits, context.with_device(OLDER_GPU))
    assert [str(reason) for reason in refused] == ["SM_NOT_AT_LEAST: sm is (8, 0), required >= (8, 9)"]


@each_operation
def test_the_result_needs_no_cast(operation: str) -> None:
    plan = lz.select(call_of(operation).context)
    assert plan.post_transforms == ()
    wider = lz.select(replace(call_of(operation).context, output_dtype="float32"))
    assert [(step.kind, step.target) for step in wider.post_transforms] == [("cast", "float32")]
