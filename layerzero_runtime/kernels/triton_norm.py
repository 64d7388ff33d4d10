"""RMSNorm, add and RMSNorm, and LayerNorm in Triton, in one pass over rows that fit into registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.triton_launch import Launch
from layerzero_runtime.kernels.triton_rows import (
    ROW_SPACE,
    ROW_TILINGS,
    matrix_and_result,
    row_tilings,
    strided_rows,
    tiled_launches,
)
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What half a block is divided by for the rest of a row. On an H100, with its rest apart from a half, LayerNorm of 8,192
# rows of 5,120 columns reaches 0.98 of a copy's speed in place of 0.71, of 4,096 rows of 1,280 columns 0.87 in place of
# 0.60, and RMSNorm 0.99 and 0.95 in place of 0.93 and 0.80 (rests of a quarter, in a plain loop; 2026-11-27). Each
# further one takes as many compilations again, seconds where a kernel is loaded first.
_REST_SHARES = (2, 1)
# By block, in place of those of `ROW_TILINGS`, which was measured without rests (and by whose file gated activations
# are found stale). On an H100 contests gave RMSNorm of 16,384 rows of 2,048 columns 0.93 of the speed of a copy of its
# size with 8 warps, and LayerNorm of 8,192 rows of 5,120 columns 0.77 with 16; a plain loop gave 0.99 with 4 and 0.98
# with 8 (2026-11-27).
_NUM_WARPS = {1024: 2, 2048: 4, 8192: 8}
_TILINGS = tuple(
    replace(tiling, num_warps=_NUM_WARPS.get(tiling.block_width, tiling.num_warps)) for tiling in ROW_TILINGS
)


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.norm import rms_norm

    dtype, weight_dtype = getattr(torch, context.dtype), getattr(torch, context.weight_dtype)
    has_weight = context.has_weight
    choose = norm_launches(
        rms_norm,
        context,
        configuration,
        pointers=(dtype, dtype, weight_dtype if has_weight else None, None, None),
        divisible=3,
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
    choose = norm_launches(
        rms_norm,
        context,
        configuration,
        pointers=(dtype, dtype, weight_dtype if has_weight else None, dtype, dtype),
        divisible=3,
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
    choose = norm_launches(
        layer_norm,
        context,
        configuration,
        pointers=(dtype, dtype, weight_dtype if has_weight else None, weight_dtype if has_bias else None),
        divisible=2,
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


def norm_launches(
    kernel: Any,
    context: SelectionContext,
    configuration: Configuration,
    *,
    pointers: Sequence[torch.dtype | None],
    divisible: int,
    constants: Mapping[str, Any],
) -> Callable[[int, int], tuple[int, Launch]]:
    """From (rows, width) to the number of programs and the launcher of the form that leaves least of a block idle."""
    tilings = row_tilings(configuration) if configuration else _TILINGS
    is_persistent = any(tiling.programs_per_multiprocessor for tiling in tilings)
    by_share = {
        share: tiled_launches(
            kernel,
            context,
            tilings,
            pointers=pointers,
            divisible=divisible,
            numbers=(int, float),
            constants={**constants, "REST_SHARE": share, "PERSISTENT": is_persistent},
        )
        for share in _REST_SHARES
    }

    @cache
    def of_width(width: int) -> Callable[[int, int], tuple[int, Launch]]:
        block = next((tiling.block_width for tiling in tilings if width <= tiling.block_width), None)
        return by_share[1 if block is None else _rest_share(width, block)]

    return lambda rows, width: of_width(width)(rows, width)


def _rest_share(width: int, block: int) -> int:
    """That of the least rest which, with half the block, holds a row of at most the block's width."""
    half = block // 2
    return next(share for share in _REST_SHARES if width <= half + half // share)


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
