"""Norms and activations of other libraries on a CUDA device: right just inside their limits.

What happens just outside them is printed (`pytest -s`), as the evidence for them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operations import OPERATIONS
from tests.gpu.row_adapters import (
    BY_ID,
    DTYPES,
    EACH,
    accepts,
    as_tuple,
    context_of,
    draw,
    fault,
    is_matrix,
    reference,
)
from tests.runtime.kernel_calls import KERNELS, relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]

# (rows, width): one row, several, widths that 16, 8 and 2 divide and odd ones, narrow and wide.
SIZES = ((1, 4096), (7, 130), (33, 14336), (513, 5120), (2048, 3072), (3, 1999), (40000, 128), (40001, 64), (5, 8))
# Libraries that compile for a width take half a second for each: other dtypes have fewer.
FEW_SIZES = SIZES[:3]
# How a matrix of rows lies in memory.
LAYOUTS = ("contiguous", "row_slices", "strided", "transposed", "odd_address")


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
