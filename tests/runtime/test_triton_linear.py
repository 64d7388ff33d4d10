"""The quantised products in Triton: scalings, splits, edges and limits.

tests/runtime/test_triton_kernels.py has what they have in common with the other Triton kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import triton_linear
from layerzero_runtime.kernels.torch_linear import MAX_INT8_FEATURES
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from tests.runtime.kernel_calls import assert_close_to_reference, quantised
from tests.runtime.triton_calls import (
    DEVICE,
    SMALL_GPU,
    SMALL_PRODUCTS,
    TRITON_KERNELS,
    bfloat16_as_on_a_device,
    call_of,
    configurations,
    fault,
    in_small_tiles,
    linear_context,
    moved,
)

KERNELS = (TRITON_KERNELS["triton.linear_fp8"], TRITON_KERNELS["triton.linear_int8"])
FORMS = [form for kernel in KERNELS for form in (kernel, in_small_tiles(kernel))]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.kernel_id)
each_form = pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.kernel_id)
H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
# Splits of 16 columns of x: 12 programs for small calls.
SPLIT_PRODUCTS = {**SMALL_PRODUCTS, "block_columns": 32, "programs_per_multiprocessor": 4}


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_device() -> Iterator[None]:
    with bfloat16_as_on_a_device():
        yield


def operation_of(kernel: Kernel) -> str:
    return kernel.spec.operations[0]


def dtype_of(kernel: Kernel) -> str:
    return kernel.spec.dtypes[0]


def context_of(kernel: Kernel, rows: int, in_features: int, out_features: int, **fields: Any) -> SelectionContext:
    return linear_context(operation_of(kernel), dtype_of(kernel), (rows, in_features, out_features), **fields)


def matrix(kernel: Kernel, *shape: int) -> torch.Tensor:
    return quantised(shape, dtype_of(kernel)).to(DEVICE)


def number(value: float = 1.0) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


@each_kernel
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale_w", ["tensor", "row"])
@pytest.mark.parametrize("scale_x", ["tensor", "row"])
def test_every_scaling_agrees_with_and_without_splits(
    kernel: Kernel, scale_x: str, scale_w: str, has_bias: bool
) -> None:
    for sizes in ((2, 200, 33), (21, 130, 70)):
        context = context_of(kernel, *sizes, scale_x=scale_x, scale_w=scale_w, has_bias=has_bias)
        for configuration in ({}, SMALL_PRODUCTS, SPLIT_PRODUCTS):
            assert fault(kernel, configuration, context) == "", (sizes, configuration)


@each_form
def test_one_function_serves_every_size(kernel: Kernel) -> None:
    function = kernel.load(context_of(kernel, 1, 1, 1), {})
    for rows, in_features, out_features in ((1, 1, 1), (3, 640, 16), (70, 17, 300), (150, 64, 1)):
        x, weight = matrix(kernel, rows, in_features), matrix(kernel, out_features, in_features)
        call = call_of(operation_of(kernel), x, weight, number(0.5), number(0.25), None)
        output = function(*call.arguments)
        assert output.shape == (rows, out_features)
        torch.testing.assert_close(output.double(), call.reference()[0], rtol=1e-2, atol=1e-2)


@each_form
def test_leading_dimensions_are_those_of_the_input(kernel: Kernel) -> None:
    x, weight = matrix(kernel, 2, 3, 40), matrix(kernel, 24, 40)
    for scale_x in (torch.rand(2, 3, 1), torch.rand(2, 3)):
        call = call_of(operation_of(kernel), x, weight, scale_x.to(DEVICE), number(), None)
        assert call.context.scale_x == "row"
        assert call.run(kernel)[0].shape == (2, 3, 24)
        assert_close_to_reference(call, kernel)


@each_form
@pytest.mark.parametrize("placements", [("transposed", "sliced"), ("sliced", "transposed"), ("strided", "strided")])
def test_matrices_need_not_be_dense(kernel: Kernel, placements: tuple[str, str]) -> None:
    parts = [
        quantised((size, 40), dtype_of(kernel), placement) for size, placement in zip((9, 50), placements, strict=True)
    ]
    call = moved(call_of(operation_of(kernel), *parts, torch.tensor(0.5), torch.tensor(0.25), None))
    assert not any(part.is_contiguous() for part in call.arguments[:2])
    assert_close_to_reference(call, kernel)


@each_form
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(0, 16, 8), (3, 16, 0)])
def test_calls_without_results_give_none(kernel: Kernel, rows: int, in_features: int, out_features: int) -> None:
    x, weight = matrix(kernel, rows, in_features), matrix(kernel, out_features, in_features)
    output = kernel.load(context_of(kernel, 1, 1, 1), {})(x, weight, number(), number(), None)
    assert output.shape == (rows, out_features)
    assert output.dtype == torch.bfloat16


@each_form
def test_a_product_over_no_features_is_the_bias(kernel: Kernel) -> None:
    x, weight = matrix(kernel, 3, 0), matrix(kernel, 40, 0)
    bias = torch.randn(40, device=DEVICE).bfloat16()
    output = kernel.load(context_of(kernel, 1, 1, 1, has_bias=True), {})(x, weight, number(), number(), bias)
    assert torch.equal(output, bias.expand(3, 40))


@pytest.mark.parametrize("kernel", FORMS[:2], ids=lambda kernel: kernel.kernel_id)
def test_what_lies_beside_the_matrices_stays_out(kernel: Kernel) -> None:
    padded = [torch.full((64, 160), torch.nan, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    views = []
    for room, rows in zip(padded, (20, 37), strict=True):
        room[:rows, :100] = matrix(kernel, rows, 100)
        views.append(room[:rows, :100])
    scales = torch.full((64, 1), torch.nan, device=DEVICE)
    scales[:37] = 0.5
    assert_close_to_reference(call_of("linear.fp8", *views, scales[:20], scales[:37], None), kernel)


@pytest.mark.parametrize("kernel", FORMS[2:], ids=lambda kernel: kernel.kernel_id)
def test_sums_of_int8_are_exact_to_the_last_feature_allowed(kernel: Kernel) -> None:
    assert 128 * 128 * MAX_INT8_FEATURES < 2**31 <= 128 * 128 * (MAX_INT8_FEATURES + 1)
    x = torch.full((2, MAX_INT8_FEATURES), -128, dtype=torch.int8, device=DEVICE)
    weight = x.clone()
    # Halves that cancel each other but for their last bits: bfloat16 would not show those of a large sum.
    x[1] = 127
    weight[1, : MAX_INT8_FEATURES // 2] = 127
    weight[1, MAX_INT8_FEATURES // 2 :] = -127
    weight[1, -1] = 1
    exact = x.long().cpu() @ weight.long().cpu().t()
    assert (int(exact[0, 0]), int(exact[1, 1])) == (2**31 - 2**14, 127)
    (output,) = call_of("linear.int8", x, weight, number(), number(), None).run(kernel)
    assert torch.equal(output.cpu(), exact.float().bfloat16())


@each_kernel
def test_splits_never_take_more_memory_than_declared(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    new_empty = torch.Tensor.new_empty

    def noted(like: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = new_empty(like, *size, **options)
        if made.dtype in (torch.float32, torch.int32) and made.nbytes:
            taken.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    context = SelectionContext(
        operation=operation_of(kernel), dtype=dtype_of(kernel), rows=3, in_features=1000, out_features=40
    ).with_device(SMALL_GPU)
    sum_bytes = 3 * 40 * 4
    # 3 multiprocessors x 4 programs for 2 tiles, of 16 blocks of features.
    for room, splits in ((10**6, 6), (4 * sum_bytes, 4), (sum_bytes, 1), (0, 1)):
        monkeypatch.setattr(triton_linear, "_WORKSPACE_BYTES", room)
        taken.clear()
        assert fault(kernel, SPLIT_PRODUCTS, context) == ""
        assert taken == ([splits * sum_bytes] if splits > 1 else [])
    assert kernel.spec.workspace_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        (KERNELS[0], {"compute_capability": (8, 6)}, "SM_NOT_AT_LEAST"),
        (KERNELS[1], {"compute_capability": (7, 5)}, "SM_NOT_AT_LEAST"),
        (KERNELS[0], {"dtype": "float8_e5m2"}, "DTYPE_NOT_ONE_OF"),
        (KERNELS[0], {"requires_grad": True}, "REQUIRES_GRAD_NOT_ONE_OF"),
        (KERNELS[0], {"rows": 2**30 + 1}, "ROWS_NOT_AT_MOST"),
        (KERNELS[1], {"in_features": MAX_INT8_FEATURES + 1}, "IN_FEATURES_NOT_AT_MOST"),
        (KERNELS[1], {"workspace_limit": 2**26 - 1}, "WORKSPACE_LIMIT_NOT_AT_LEAST"),
        (KERNELS[0], {"platform": "cpu"}, "PLATFORM_NOT_ONE_OF"),
    ],
)
def test_calls_beyond_its_limits_are_refused(kernel: Kernel, changes: dict[str, Any], reason: str) -> None:
    place = {name: changes.pop(name) for name in ("compute_capability", "platform") if name in changes}
    described: dict[str, Any] = {"platform": "cuda", "name": "GPU", "compute_capability": (9, 0)} | place
    fields: dict[str, Any] = {
        "dtype": dtype_of(kernel),
        "rows": 2**30,
        "in_features": MAX_INT8_FEATURES,
        "out_features": 64,
    } | changes
    context = SelectionContext(operation=operation_of(kernel), device=DeviceSpec(**described), **fields)
    assert [rejection.code for rejection in rejections(kernel.spec.limits, context)] == [reason]


@each_kernel
def test_configurations_beyond_a_small_call_are_not_tried(kernel: Kernel) -> None:
    def values(name: str, rows: int, in_features: int, out_features: int) -> set[Any]:
        context = SelectionContext(
            operation=operation_of(kernel),
            dtype=dtype_of(kernel),
            rows=rows,
            in_features=in_features,
            out_features=out_features,
        ).with_device(H100)
        return {configuration[name] for configuration in configurations(kernel, context)}

    assert values("block_rows", 1, 4096, 4096) == {16}
    assert values("block_columns", 64, 4096, 33) == {32, 64}
    assert values("block_depth", 64, 100, 4096) == {64, 128}
    # One row of tiles has one order; many tiles need no splits, and one block of features has none.
    assert values("group_rows", 16, 4096, 4096) == {1}
    assert values("group_rows", 512, 4096, 4096) == {1, 8}
    assert values("programs_per_multiprocessor", 16, 4096, 4096) == {0, 1, 2}
    assert values("programs_per_multiprocessor", 8192, 4096, 4096) == {0}
    assert values("programs_per_multiprocessor", 16, 64, 4096) == {0}


def test_the_kernels_sources_are_those_of_their_code() -> None:
    assert all("triton_sources/matmul.py" in kernel.sources for kernel in KERNELS)
    assert all(OPERATIONS[operation_of(kernel)].default_kernel != kernel.kernel_id for kernel in KERNELS)
