"""RMSNorm, with or without a residual sum before it, and LayerNorm, over the rows of a matrix.

A program takes a tile of `ROWS` rows, and if `PERSISTENT` goes on with as many others as the grid leaves to it; else
the grid has a program for each tile. Rows that fit stay in registers between their sums and their results, as half a
`BLOCK` of columns and a rest of that half over `REST_SHARE`: in one block a row of 5,120 columns would take the
registers and the threads of 8,192. Longer rows are read twice, block by block.
"""

import triton
import triton.language as tl

# From blocks of this width on, LayerNorm loads its weights behind its sums: beside the values they would take the
# registers that let a second program share a multiprocessor (on an H100 99 per thread in place of 64).
LATE_BLOCK: tl.constexpr = tl.constexpr(8192)


@triton.jit
def _load_parts(at, first, second, width, is_row):
    """What lies at the pointers, (rows, 1), behind which these columns are, in both parts; 0 beyond the width."""
    a = tl.load(at + first[None, :], mask=is_row & (first < width)[None, :], other=0.0)
    b = tl.load(at + second[None, :], mask=is_row & (second < width)[None, :], other=0.0)
    return a, b


@triton.jit
def _load_vector(at, first, second, width):
    """The same of a vector, (columns)."""
    a = tl.load(at + first, mask=first < width, other=0.0)
    b = tl.load(at + second, mask=second < width, other=0.0)
    return a, b


@triton.jit
def _store_parts(at, a, b, first, second, width, is_row):
    """Both parts of rows, in the type of the pointers."""
    tl.store(at + first[None, :], a.to(at.dtype.element_ty), mask=is_row & (first < width)[None, :])
    tl.store(at + second[None, :], b.to(at.dtype.element_ty), mask=is_row & (second < width)[None, :])


@triton.jit
def _rms_whole_rows(
    tile,
    x,
    output,
    weight,
    residual,
    total,
    x_stride,
    residual_stride,
    width,
    rows,
    eps,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_SHARE: tl.constexpr,
):
    """`rms_norm` of the rows of a tile, which fit."""
    half: tl.constexpr = BLOCK // 2
    rest: tl.constexpr = half // REST_SHARE
    first, second = tl.arange(0, half), half + tl.arange(0, rest)
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = (row < rows)[:, None]
    written = row[:, None] * width
    # All loads before what waits for any of them.
    a, b = _load_parts(x + row[:, None] * x_stride, first, second, width, is_row)
    if residual is not None:
        a_other, b_other = _load_parts(residual + row[:, None] * residual_stride, first, second, width, is_row)
    if weight is not None:
        a_factor, b_factor = _load_vector(weight, first, second, width)
    if residual is not None:
        a = (a.to(tl.float32) + a_other.to(tl.float32)).to(total.dtype.element_ty)
        b = (b.to(tl.float32) + b_other.to(tl.float32)).to(total.dtype.element_ty)
        _store_parts(total + written, a, b, first, second, width, is_row)
    a, b = a.to(tl.float32), b.to(tl.float32)
    mean_square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    a, b = a * scale, b * scale
    if weight is not None:
        a *= (a_factor.to(tl.float32) + OFFSET)[None, :]
        b *= (b_factor.to(tl.float32) + OFFSET)[None, :]
    _store_parts(output + written, a, b, first, second, width, is_row)


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
    REST_SHARE: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """output = v / sqrt(mean(v^2) + eps) x (weight + OFFSET), where v is x, or with a residual total = x + residual.

    x and residual: (rows, width) with these strides between rows; output, total: (rows, width), weight: (width), dense.
    """
    tiles = tl.cdiv(rows, ROWS)
    half: tl.constexpr = BLOCK // 2
    rest: tl.constexpr = half // REST_SHARE
    if width <= half + rest:
        if PERSISTENT:
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
                _rms_whole_rows(
                    tile,
                    x,
                    output,
                    weight,
                    residual,
                    total,
                    x_stride,
                    residual_stride,
                    width,
                    rows,
                    eps,
                    OFFSET,
                    ROWS,
                    BLOCK,
                    REST_SHARE,
                )
        else:
            # A loop over one tile takes a quarter more registers (58 per thread in place of 47; Triton 3.6, sm_90).
            _rms_whole_rows(
                tl.program_id(0),
                x,
                output,
                weight,
                residual,
                total,
                x_stride,
                residual_stride,
                width,
                rows,
                eps,
                OFFSET,
                ROWS,
                BLOCK,
                REST_SHARE,
            )
    else:
        columns = tl.arange(0, BLOCK)
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


@triton.jit
def _layer_whole_rows(
    tile,
    x,
    output,
    weight,
    bias,
    x_stride,
    width,
    rows,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_SHARE: tl.constexpr,
):
    """`layer_norm` of the rows of a tile, which fit."""
    half: tl.constexpr = BLOCK // 2
    rest: tl.constexpr = half // REST_SHARE
    first, second = tl.arange(0, half), half + tl.arange(0, rest)
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = (row < rows)[:, None]
    a, b = _load_parts(x + row[:, None] * x_stride, first, second, width, is_row)
    if BLOCK < LATE_BLOCK:
        if weight is not None:
            a_factor, b_factor = _load_vector(weight, first, second, width)
        if bias is not None:
            a_shift, b_shift = _load_vector(bias, first, second, width)
    a, b = a.to(tl.float32), b.to(tl.float32)
    mean = ((tl.sum(a, axis=1) + tl.sum(b, axis=1)) / width)[:, None]
    a = tl.where(is_row & (first < width)[None, :], a - mean, 0.0)
    b = tl.where(is_row & (second < width)[None, :], b - mean, 0.0)
    variance = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    a, b = a * scale, b * scale
    if weight is not None:
        if BLOCK >= LATE_BLOCK:
            a_factor, b_factor = _load_vector(weight, first, second, width)
        a *= a_factor.to(tl.float32)[None, :]
        b *= b_factor.to(tl.float32)[None, :]
    if bias is not None:
        if BLOCK >= LATE_BLOCK:
            a_shift, b_shift = _load_vector(bias, first, second, width)
        a += a_shift.to(tl.float32)[None, :]
        b += b_shift.to(tl.float32)[None, :]
    _store_parts(output + row[:, None] * width, a, b, first, second, width, is_row)


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
    REST_SHARE: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """output = (x - mean) / sqrt(variance + eps) x weight + bias, with the population variance.

    x: (rows, width) with this stride between rows; output: (rows, width), weight and bias: (width), dense.
    """
    tiles = tl.cdiv(rows, ROWS)
    half: tl.constexpr = BLOCK // 2
    rest: tl.constexpr = half // REST_SHARE
    if width <= half + rest:
        if PERSISTENT:
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
                _layer_whole_rows(tile, x, output, weight, bias, x_stride, width, rows, eps, ROWS, BLOCK, REST_SHARE)
        else:
            # A loop over one tile takes a quarter more registers (58 per thread in place of 47; Triton 3.6, sm_90).
            _layer_whole_rows(
                tl.program_id(0), x, output, weight, bias, x_stride, width, rows, eps, ROWS, BLOCK, REST_SHARE
            )
    else:
        columns = tl.arange(0, BLOCK)
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
