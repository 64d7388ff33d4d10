"""What Triton kernels over rows of a matrix have in common: the rows of a tensor, tiles of rows, and their space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace
from layerzero_runtime.kernels.triton_device import ITEM_BYTES, multiprocessors, stay_resident
from layerzero_runtime.kernels.triton_launch import Launch, TritonForm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# float32 values of a tile that a thread holds: a third of its 255 registers, beside the weight's and the addresses.
MOST_PER_THREAD = 64
# Fewer leave threads without work, or without the 16 bytes that one instruction reads.
LEAST_PER_THREAD = 4


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut up: by default for rows of at most `block_width`.

    Attributes:
        block_width: columns of a tile, a power of two.
        rows_per_program: rows of a tile, a power of two.
        programs_per_multiprocessor: programs that share all tiles between them; 0 for a program per tile.
    """

    block_width: int
    rows_per_program: int
    num_warps: int
    num_stages: int = 1
    programs_per_multiprocessor: int = 0


def tiled_launches(
    kernel: Any,
    context: SelectionContext,
    tilings: Sequence[Tiling],
    *,
    pointers: Sequence[torch.dtype | None],
    divisible: int,
    numbers: Sequence[type[int] | type[float]],
    constants: Mapping[str, Any],
) -> Callable[[int, int], tuple[int, Launch]]:
    """From (rows, width) to the number of programs and the launcher, of the first tiling whose block holds a row, or
    else the last."""
    choices = []
    for tiling in tilings:
        form = TritonForm(
            kernel,
            tuple(pointers),
            divisible,
            tuple(numbers),
            {
                **constants,
                "ROWS": tiling.rows_per_program,
                "BLOCK": tiling.block_width,
                "STAGES": tiling.num_stages,
            },
            tiling.num_warps,
        )
        most = tiling.programs_per_multiprocessor * multiprocessors(context)
        choices.append((tiling.block_width, tiling.rows_per_program, most, form.launcher(context)))

    def choose(rows: int, width: int) -> tuple[int, Launch]:
        for block_width, tile_rows, most, launch in choices:  # noqa: B007 - the last one is for all other widths
            if width <= block_width:
                break
        tiles = -(-rows // tile_rows)
        return (most if 0 < most < tiles else tiles), launch

    return choose


def matrix_and_result(x: Tensor, width: int) -> tuple[Tensor, int, Tensor]:
    """x as rows, the stride between them, and dense memory for a result of x's shape and dtype."""
    import torch

    if x.is_contiguous():
        return x, width, torch.empty_like(x)
    return *strided_rows(x, width), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def strided_rows(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x as dense rows at one stride, and that stride; copied where its rows are not dense or lie at several."""
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if width > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _fits(configuration: Configuration, context: SelectionContext) -> bool:
    block: int = configuration["block_width"]
    rows: int = configuration["rows_per_program"]
    warps, programs = configuration["num_warps"], configuration["programs_per_multiprocessor"]
    # Registers.
    if not LEAST_PER_THREAD <= block * rows // (32 * warps) <= MOST_PER_THREAD:
        return False
    # Tiles of two tensors are in flight, of x and the residual or the weight, or of three with a bias.
    item_bytes = max(ITEM_BYTES[context.dtype], ITEM_BYTES[context.weight_dtype])
    tile_bytes = (2 + context.has_bias) * block * rows * item_bytes
    if not stay_resident(context, programs, warps, (configuration["num_stages"] - 1) * tile_bytes):
        return False
    width, all_rows = context.hidden_size, context.rows
    if width is None or all_rows is None:
        return True
    is_whole = block >= width
    # Loads are in flight ahead of a loop alone: over the tiles of a program, or over the blocks of a row.
    if configuration["num_stages"] > 1 and is_whole and not programs:
        return False
    # A tile beyond the matrix is idle, and several rows that do not fit into registers gain nothing over one.
    if is_whole:
        return (block < 2 * width or block == ROW_PARAMETERS["block_width"][0]) and rows < 2 * all_rows
    return rows == 1


ROW_PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "block_width": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "rows_per_program": (1, 2, 4, 8, 16, 32),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
    "programs_per_multiprocessor": (0, 1, 2, 4, 8, 16),
}
ROW_SPACE = ConfigurationSpace(
    ROW_PARAMETERS, _fits, lambda configuration, context: configuration["block_width"] >= (context.hidden_size or 0)
)
# Whole rows of 8 to 32 values per thread, with as little of the block idle as powers of two allow (on an H100 norms of
# 1,280 columns in blocks of 4,096, and of 5,120 in 16,384, took twice the time of the best kernel; 2026-11-26); longer
# ones by blocks.
ROW_TILINGS = (
    Tiling(block_width=256, rows_per_program=8, num_warps=4),
    Tiling(block_width=1024, rows_per_program=1, num_warps=4),
    Tiling(block_width=2048, rows_per_program=1, num_warps=8),
    Tiling(block_width=4096, rows_per_program=1, num_warps=8),
    Tiling(block_width=8192, rows_per_program=1, num_warps=16),
    Tiling(block_width=16384, rows_per_program=1, num_warps=16),
)


def row_tilings(configuration: Configuration) -> tuple[Tiling, ...]:
    """That of a configuration of `ROW_SPACE`; of an empty one those that together are good for all widths."""
    return (Tiling(**configuration),) if configuration else ROW_TILINGS
