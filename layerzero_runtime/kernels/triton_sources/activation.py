"""Gated activations of two matrices, element by element."""

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh(y)) / 2 = sigmoid(2y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["rows"])
def gated(
    gate,
    up,
    output,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    width: tl.int64,
    rows: tl.int32,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """output = activation(gate) x up.

    gate and up: (rows, width) with these strides between rows; output: (rows, width), dense. A program takes `BLOCK`
    columns of a row at a time, and goes on with as many other blocks as the grid leaves to it.
    """
    columns = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK).to(tl.int32)
    for block in tl.range(tl.program_id(0), rows * blocks, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(block // blocks, tl.int64)
        start = tl.cast(block % blocks, tl.int64) * BLOCK
        is_there = columns < width - start
        x = tl.load(gate + row * gate_stride + start + columns, mask=is_there, other=0.0).to(tl.float32)
        factor = tl.load(up + row * up_stride + start + columns, mask=is_there, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            active = _silu(x)
        elif ACTIVATION == "gelu_tanh":
            active = _gelu_tanh(x)
        else:
            active = _gelu(x)
        tl.store(output + row * width + start + columns, (active * factor).to(output.dtype.element_ty), mask=is_there)
