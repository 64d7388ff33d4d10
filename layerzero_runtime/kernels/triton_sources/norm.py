"""RMSNorm, with or without a residual sum before it, and LayerNorm, over the rows of a matrix.

A program takes `ROWS` rows at a time, and goes on with as many other rows as the grid leaves to it. Rows of at most
`BLOCK` columns stay in registers between their sums and their results; longer ones are read twice, block by block.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x,
    output,
    weight,
    residual,
    total,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    width: tl.int32,
    rows: tl.int32,
    eps,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """output = v / sqrt(mean(v^2) + eps) x (weight + OFFSET), where v is x, or with a residual total = x + residual.

    x and residual: (rows, width) with these strides between rows; output, total: (rows, width), weight: (width), dense.
    """
    columns = tl.arange(0, BLOCK)
    tiles = tl.cdiv(rows, ROWS)
    if width <= BLOCK:
        is_column = columns < width
        if weight is not None:
            factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32) + OFFSET
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            is_there = (row < rows)[:, None] & is_column[None, :]
            read = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=is_there, other=0.0)
            written = row[:, None] * width + columns[None, :]
            if residual is not None:
                other = tl.load(residual + row[:, None] * residual_stride + columns[None, :], mask=is_there, other=0.0)
                read = (read.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
                tl.store(total + written, read, mask=is_there)
            values = read.to(tl.float32)
            mean_square = tl.sum(values * values, axis=1) / width
            values *= tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
            if weight is not None:
                values *= factor[None, :]
            tl.store(output + written, values.to(output.dtype.element_ty), mask=is_there)
    else:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            is_row = (row < rows)[:, None]
            squares = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in tl.range(0, width, BLOCK, num_stages=STAGES):
                column = (start + columns)[None, :]
                is_there = is_row & (column < width)
                read = tl.load(x + row[:, None] * x_stride + column, mask=is_there, other=0.0)
                if residual is not None:
                    other = tl.load(residual + row[:, None] * residual_stride + column, mask=is_there, other=0.0)
                    read = (read.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
                    tl.store(total + row[:, None] * width + column, read, mask=is_there)
                values = read.to(tl.float32)
                squares += values * values
            scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / width + eps))[:, None]
            if residual is not None:
                # What follows reads what other threads of this program have written.
                tl.debug_barrier()
            for start in tl.range(0, width, BLOCK, num_stages=STAGES):
                column = (start + columns)[None, :]
                is_there = is_row & (column < width)
                written = row[:, None] * width + column
                if residual is not None:
                    values = tl.load(total + written, mask=is_there, other=0.0).to(tl.float32)
                else:
                    values = tl.load(x + row[:, None] * x_stride + column, mask=is_there, other=0.0).to(tl.float32)
                values *= scale
                if weight is not None:
                    values *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
                tl.store(output + written, values.to(output.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["rows"])
def layer_norm(
    x,
    output,
    weight,
    bias,
    x_stride: tl.int64,
    width: tl.int32,
    rows: tl.int32,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """output = (x - mean) / sqrt(variance + eps) x weight + bias, with the population variance.

    x: (rows, width) with this stride between rows; output: (rows, width), weight and bias: (width), dense.
    """
    columns = tl.arange(0, BLOCK)
    tiles = tl.cdiv(rows, ROWS)
    if width <= BLOCK:
        is_column = columns < width
        if weight is not None:
            factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
        if bias is not None:
            shift = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            is_there = (row < rows)[:, None] & is_column[None, :]
            values = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=is_there, other=0.0).to(tl.float32)
            mean = tl.sum(values, axis=1) / width
            values = tl.where(is_there, values - mean[:, None], 0.0)
            variance = tl.sum(values * values, axis=1) / width
            values *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
            if weight is not None:
                values *= factor[None, :]
            if bias is not None:
                values += shift[None, :]
            written = row[:, None] * width + columns[None, :]
            tl.store(output + written, values.to(output.dtype.element_ty), mask=is_there)
    else:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            is_row = (row < rows)[:, None]
            mean = tl.zeros([ROWS], tl.float32)
            deviation = tl.zeros([ROWS], tl.float32)
            for start in tl.range(0, width, BLOCK, num_stages=STAGES):
                # The blocks' means and sums of squared deviations, joined pairwise (Chan, Golub and LeVeque 1983).
                column = (start + columns)[None, :]
                is_there = is_row & (column < width)
                values = tl.load(x + row[:, None] * x_stride + column, mask=is_there, other=0.0).to(tl.float32)
                seen = tl.cast(start, tl.float32)
                count = tl.minimum(width - start, BLOCK).to(tl.float32)
                block_mean = tl.sum(values, axis=1) / count
                values = tl.where(is_there, values - block_mean[:, None], 0.0)
                difference = block_mean - mean
                share = count / (seen + count)
                mean += difference * share
                deviation += tl.sum(values * values, axis=1) + difference * difference * seen * share
            scale = tl.div_rn(1.0, tl.sqrt_rn(deviation / width + eps))[:, None]
            for start in tl.range(0, width, BLOCK, num_stages=STAGES):
                column = (start + columns)[None, :]
                is_column = column < width
                is_there = is_row & is_column
                values = tl.load(x + row[:, None] * x_stride + column, mask=is_there, other=0.0).to(tl.float32)
                values = (values - mean[:, None]) * scale
                if weight is not None:
                    values *= tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
                if bias is not None:
                    values += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
                tl.store(output + row[:, None] * width + column, values.to(output.dtype.element_ty), mask=is_there)
