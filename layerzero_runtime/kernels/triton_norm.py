"""RMSNorm, add and RMSNorm, and LayerNorm in Triton, in one pass over rows that fit into registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.triton_rows import (
    ROW_SPACE,
    matrix_and_result,
    row_tilings,
    strided_rows,
    tiled_launches,
)
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.norm import rms_norm

    dtype, weight_dtype = getattr(torch, context.dtype), getattr(torch, context.weight_dtype)
    has_weight = context.has_weight
    choose = tiled_launches(
        rms_norm,
        context,
        row_tilings(configuration),
        pointers=(dtype, dtype, weight_dtype if has_weight else None, None, None),
        divisible=3,
        numbers=(int, float),
        constants={"OFFSET": context.offset},
    )

    def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        width = x.shape[-1]
        x, stride, output = matrix_and_result(x, width)
        rows = x.numel() // width if width else 0
        programs, launch = choose(rows, width)
        tensors = (x, output, weight.contiguous()) if has_weight else (x, output)
        launch(programs, tensors, (stride, width, width), (rows, eps))
        return output

    return normalise


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.norm import rms_norm

    dtype, weight_dtype = getattr(torch, context.dtype), getattr(torch, context.weight_dtype)
    has_weight = context.has_weight
    choose = tiled_launches(
        rms_norm,
        context,
        row_tilings(configuration),
        pointers=(dtype, dtype, weight_dtype if has_weight else None, dtype, dtype),
        divisible=3,
        numbers=(int, float),
        constants={"OFFSET": 0.0},
    )

    def normalise(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        x, stride, output = matrix_and_result(x, width)
        residual, residual_stride = strided_rows(residual, width)
        total = torch.empty_like(output)
        rows = x.numel() // width if width else 0
        programs, launch = choose(rows, width)
        vectors = (weight.contiguous(),) if has_weight else ()
        launch(programs, (x, output, *vectors, residual, total), (stride, residual_stride, width), (rows, eps))
        return output, total

    return normalise


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.norm import layer_norm

    dtype, weight_dtype = getattr(torch, context.dtype), getattr(torch, context.weight_dtype)
    has_weight, has_bias = context.has_weight, context.has_bias
    choose = tiled_launches(
        layer_norm,
        context,
        row_tilings(configuration),
        pointers=(dtype, dtype, weight_dtype if has_weight else None, weight_dtype if has_bias else None),
        divisible=2,
        numbers=(int, float),
        constants={},
    )

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        x, stride, output = matrix_and_result(x, width)
        rows = x.numel() // width if width else 0
        programs, launch = choose(rows, width)
        tensors = [x, output]
        if has_weight:
            tensors.append(weight.contiguous())
        if has_bias:
            tensors.append(bias.contiguous())
        launch(programs, tensors, (stride, width), (rows, eps))
        return output

    return normalise


def _declare(kernel_id: str, operation: str) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
        library="triton",
        requires=("torch", "triton"),
        min_version="3.4",
        min_sm=(8, 0),  # Triton's own
        max_hidden_size=2**24,  # columns are numbered in 32 bits, up to the next block
        supports_mixed_weight_dtype=True,
        compiles=True,
        priority=30,
        extra_limits=(
            Limit("mixed_weight_dtype", "one_of", (None, "float32", "float16", "bfloat16")),
            Limit("rows", "at_most", 2**30),  # tiles are numbered in 32 bits, one grid beyond the last
        ),
    )


_SOURCES = ("triton_rows.py", "triton_device.py", "triton_launch.py", "triton_sources/norm.py")
KERNELS = (
    Kernel(_declare("triton.rms_norm", "norm.rms"), _load_rms, ROW_SPACE, _SOURCES),
    Kernel(_declare("triton.add_rms_norm", "norm.add_rms"), _load_add_rms, ROW_SPACE, _SOURCES),
    Kernel(_declare("triton.layer_norm", "norm.layer"), _load_layer, ROW_SPACE, _SOURCES),
)
