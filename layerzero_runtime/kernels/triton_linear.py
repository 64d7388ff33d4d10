"""Quantised linear layers in Triton: one pass with the scales behind it, or the features split between programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import LINEAR_OUTPUT, SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.torch_linear import MAX_INT8_FEATURES
from layerzero_runtime.kernels.triton_device import multiprocessors, shared_bytes
from layerzero_runtime.kernels.triton_launch import TritonForm
from layerzero_runtime.kernels.triton_rows import strided_rows
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

# Beside the output, sums of the splits: never more, with fewer splits where they would be.
_WORKSPACE_BYTES = 64 * 2**20
_SUM_BYTES = 4
# Columns of a row that a program of `add_splits` takes.
_ADDED_COLUMNS = 1024
# Products of float8 that a tensor core of sm_90 may sum by itself: it keeps 14 bits, and sums of more are wrong by up
# to 2% (DeepSeek-V3, arXiv:2412.19437, section 3.3.2, which takes 128 too).
_IMPRECISE_PRODUCTS = 128
# Sums of a tile that a thread holds, of its 255 registers. Of float8 it holds those of the last products beside them.
_MOST_PER_THREAD: Mapping[str, int] = {"float8_e4m3fn": 64, "int8": 128}
_LEAST_PER_THREAD = 4
_LEAST_IN_FLIGHT = 32 * 1024

# For up to so many rows as the tile has; the last one for more.
_DEFAULTS: tuple[Configuration, ...] = (
    {
        "block_rows": 16,
        "block_columns": 64,
        "block_depth": 256,
        "num_warps": 4,
        "num_stages": 4,
        "group_rows": 1,
        "programs_per_multiprocessor": 2,
    },
    {
        "block_rows": 64,
        "block_columns": 64,
        "block_depth": 128,
        "num_warps": 4,
        "num_stages": 4,
        "group_rows": 1,
        "programs_per_multiprocessor": 2,
    },
    {
        "block_rows": 128,
        "block_columns": 128,
        "block_depth": 128,
        "num_warps": 8,
        "num_stages": 3,
        "group_rows": 8,
        "programs_per_multiprocessor": 1,
    },
)


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch
    import triton.language as tl

    from layerzero_runtime.kernels.triton_sources.matmul import add_splits, multiply_tiles

    dtype, output_dtype = getattr(torch, context.dtype), getattr(torch, LINEAR_OUTPUT)
    is_integer = context.dtype == "int8"
    sum_dtype = torch.int32 if is_integer else torch.float32
    bias_dtype = output_dtype if context.has_bias else None
    scales: dict[str, Any] = {
        "SCALES_BY_ROW": context.scale_x == "row",
        "SCALES_BY_COLUMN": context.scale_w == "row",
    }
    choices = []
    for chosen in (configuration,) if configuration else _DEFAULTS:
        form = TritonForm(
            multiply_tiles,
            pointers=(dtype, dtype, torch.float32, torch.float32, output_dtype, sum_dtype, bias_dtype),
            divisible=4,
            numbers=(int, int, int),
            constants={
                **scales,
                "SUM": tl.int32 if is_integer else tl.float32,
                "ROWS": chosen["block_rows"],
                "COLUMNS": chosen["block_columns"],
                "DEPTH": chosen["block_depth"],
                "GROUP": chosen["group_rows"],
                "IMPRECISE": 0 if is_integer else min(_IMPRECISE_PRODUCTS, chosen["block_depth"]),
            },
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
        )
        wanted = chosen["programs_per_multiprocessor"] * multiprocessors(context)
        choices.append((chosen, wanted, form.launcher(context)))
    add = TritonForm(
        add_splits,
        pointers=(sum_dtype, torch.float32, torch.float32, output_dtype, bias_dtype),
        divisible=1,
        numbers=(int, int),
        constants={**scales, "BLOCK": _ADDED_COLUMNS},
        num_warps=4,
    ).launcher(context)

    def multiply(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None) -> Tensor:
        columns, depth = weight.shape
        output = x.new_empty((*x.shape[:-1], columns), dtype=output_dtype)
        rows = output.numel() // columns if columns else 0
        for chosen, wanted, launch in choices:  # noqa: B007 - the last one is for all other numbers
            if rows <= chosen["block_rows"]:
                break
        tiles = -(-rows // chosen["block_rows"]) * -(-columns // chosen["block_columns"])
        blocks = -(-depth // chosen["block_depth"])
        splits = _splits(tiles, blocks, wanted, _SUM_BYTES * output.numel())
        blocks_per_split = -(-blocks // splits)
        splits = -(-blocks // blocks_per_split) if blocks else 1
        partial = output
        if splits > 1:
            partial = output.new_empty(splits * output.numel(), dtype=sum_dtype)
        x, x_stride = strided_rows(x, depth)
        weight, weight_stride = strided_rows(weight, depth)
        scale_x, scale_w = scale_x.contiguous(), scale_w.contiguous()
        shift = () if bias is None else (bias.contiguous(),)
        launch(
            tiles * splits,
            (x, weight, scale_x, scale_w, output, partial, *shift),
            (x_stride, weight_stride, columns, depth),
            (rows, blocks_per_split, splits),
        )
        if splits > 1:
            add(
                rows * -(-columns // _ADDED_COLUMNS),
                (partial, scale_x, scale_w, output, *shift),
                (columns,),
                (rows, splits),
            )
        return output

    return multiply


def _splits(tiles: int, blocks: int, wanted: int, sum_bytes: int) -> int:
    """How many programs share a tile, so that there are about as many as wanted."""
    if not tiles or 2 * tiles > wanted:
        return 1
    return max(1, min(blocks, wanted // tiles, _WORKSPACE_BYTES // sum_bytes))


def _fits(configuration: Configuration, context: SelectionContext) -> bool:
    rows: int = configuration["block_rows"]
    columns: int = configuration["block_columns"]
    depth: int = configuration["block_depth"]
    warps, stages = configuration["num_warps"], configuration["num_stages"]
    programs: int = configuration["programs_per_multiprocessor"]
    # Registers.
    if not _LEAST_PER_THREAD <= rows * columns // (32 * warps) <= _MOST_PER_THREAD[context.dtype]:
        return False
    # Shared memory: tiles in flight, of a byte per value. Fewer of them would not hide how long a load takes.
    in_flight = stages * (rows + columns) * depth
    if not _LEAST_IN_FLIGHT <= in_flight <= shared_bytes(context):
        return False
    # A warp computes 16 rows, or 8 columns of them; one beyond the tile has nothing to do.
    if warps > rows // 16 * (columns // 8):
        return False
    if context.rows is None or context.in_features is None or context.out_features is None:
        return True
    # Tiles beyond the call are idle.
    if not (rows == 16 or rows < 2 * context.rows) or not (columns == 32 or columns < 2 * context.out_features):
        return False
    if depth > 64 and depth >= 2 * context.in_features:
        return False
    # A single row of tiles has one order.
    tiles_down = -(-context.rows // rows)
    if configuration["group_rows"] > 1 and tiles_down == 1:
        return False
    tiles = tiles_down * -(-context.out_features // columns)
    if not programs or context.device is None or context.device.multiprocessors is None:
        return True
    # Where nothing is split, the number of programs changes nothing.
    blocks = -(-context.in_features // depth)
    return _splits(tiles, blocks, programs * context.device.multiprocessors, _SUM_BYTES) > 1


_SPACE = ConfigurationSpace(
    {
        "block_rows": (16, 32, 64, 128, 256),
        "block_columns": (32, 64, 128, 256),
        "block_depth": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "group_rows": (1, 8),
        "programs_per_multiprocessor": (0, 1, 2),
    },
    _fits,
)


def _declare(kernel_id: str, operation: str, dtype: str, min_sm: tuple[int, int], *limits: Limit) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=(dtype,),
        library="triton",
        requires=("torch", "triton"),
        min_version="3.4",
        min_sm=min_sm,
        workspace_bytes=_WORKSPACE_BYTES,
        compiles=True,
        priority=30,
        extra_limits=(Limit("rows", "at_most", 2**30), *limits),  # rows are counted in 32 bits, a tile beyond the last
    )


_SOURCES = ("triton_rows.py", "triton_device.py", "triton_launch.py", "triton_sources/matmul.py")
KERNELS = (
    # The tensor cores of sm_89 are the first that multiply float8.
    Kernel(_declare("triton.linear_fp8", "linear.fp8", "float8_e4m3fn", (8, 9)), _load, _SPACE, _SOURCES),
    Kernel(
        _declare(
            "triton.linear_int8", "linear.int8", "int8", (8, 0), Limit("in_features", "at_most", MAX_INT8_FEATURES)
        ),
        _load,
        _SPACE,
        _SOURCES,
    ),
)
