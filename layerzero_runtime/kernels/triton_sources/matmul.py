"""Products of quantised matrices, scaled back: x weight^T x scale_x x scale_w + bias.

A program takes one tile of the output and one split of the features that are summed over. Where there are several
splits, what each gives is summed by `add_splits`, in the order of the splits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "blocks_per_split", "splits"])
def multiply_tiles(
    x,
    weight,
    scale_x,
    scale_w,
    output,
    partial,
    bias,
    x_stride: tl.int64,
    weight_stride: tl.int64,
    columns: tl.int32,
    depth: tl.int32,
    rows: tl.int32,
    blocks_per_split: tl.int32,
    splits: tl.int32,
    SCALES_BY_ROW: tl.constexpr,
    SCALES_BY_COLUMN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """The tiles of a product, over one split of its depth each.

    x: (rows, depth), weight: (columns, depth), with these strides between dense rows. scale_x: one number or (rows),
    scale_w: one number or (columns), bias: (columns) or None. With one split the scaled result goes to `output`,
    (rows, columns), dense; with several the sums of the splits, in SUM, to `partial`, (splits, rows, columns).
    `GROUP` rows of tiles are gone through together, so that they find the weight's tiles in the cache. `IMPRECISE` is
    how many products of float8 tensor cores may sum by themselves, in fewer bits than float32 has.
    """
    tiles_down = tl.cdiv(rows, ROWS)
    tiles_across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    split = program // (tiles_down * tiles_across)
    tile = program % (tiles_down * tiles_across)
    first_down = tile // (GROUP * tiles_across) * GROUP
    group = tl.minimum(tiles_down - first_down, GROUP)
    down = first_down + tile % (GROUP * tiles_across) % group
    across = tile % (GROUP * tiles_across) // group

    row = (down * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    is_row = row < rows
    is_column = column < columns
    # A multiple of DEPTH: the compiler reads 16 bytes at a time where it knows that.
    first = split * blocks_per_split * DEPTH
    last = tl.minimum(first + blocks_per_split * DEPTH, depth)
    place = tl.arange(0, DEPTH)
    # Rows and columns beyond the matrices read the last ones, which costs nothing and needs no mask.
    x_tile = x + tl.minimum(row, rows - 1)[:, None] * x_stride + place[None, :]
    weight_tile = weight + tl.minimum(column, columns - 1)[None, :] * weight_stride + place[:, None]
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(first, last, DEPTH):
        is_there = start + place < depth
        left = tl.load(x_tile + start, mask=is_there[None, :], other=0.0)
        right = tl.load(weight_tile + start, mask=is_there[:, None], other=0.0)
        total = tl.dot(left, right, total, max_num_imprecise_acc=IMPRECISE, out_dtype=SUM)

    written = row[:, None] * columns + column[None, :]
    is_written = is_row[:, None] & is_column[None, :]
    if splits == 1:
        scaled = total.to(tl.float32)
        if SCALES_BY_ROW:
            scaled *= tl.load(scale_x + row, mask=is_row, other=0.0)[:, None]
        else:
            scaled *= tl.load(scale_x)
        if SCALES_BY_COLUMN:
            scaled *= tl.load(scale_w + column, mask=is_column, other=0.0)[None, :]
        else:
            scaled *= tl.load(scale_w)
        if bias is not None:
            scaled += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        tl.store(output + written, scaled.to(output.dtype.element_ty), mask=is_written)
    else:
        whole = tl.cast(rows, tl.int64) * columns
        tl.store(partial + split * whole + written, total, mask=is_written)


@triton.jit(do_not_specialize=["rows", "splits"])
def add_splits(
    partial,
    scale_x,
    scale_w,
    output,
    bias,
    columns: tl.int32,
    rows: tl.int32,
    splits: tl.int32,
    SCALES_BY_ROW: tl.constexpr,
    SCALES_BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the splits, scaled as `multiply_tiles` does it, for one block of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_column = column < columns
    whole = tl.cast(rows, tl.int64) * columns
    place = partial + row * columns + column
    total = tl.load(place, mask=is_column, other=0.0)
    for _ in range(1, splits):
        place += whole
        total += tl.load(place, mask=is_column, other=0.0)
    scaled = total.to(tl.float32)
    if SCALES_BY_ROW:
        scaled *= tl.load(scale_x + row)
    else:
        scaled *= tl.load(scale_x)
    if SCALES_BY_COLUMN:
        scaled *= tl.load(scale_w + column, mask=is_column, other=0.0)
    else:
        scaled *= tl.load(scale_w)
    if bias is not None:
        scaled += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + row * columns + column, scaled.to(output.dtype.element_ty), mask=is_column)
