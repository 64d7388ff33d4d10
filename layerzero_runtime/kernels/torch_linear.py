"""Quantised linear layers by torch: `torch._scaled_mm`, `torch._int_mm` and a scaling behind it, and in bfloat16.

On a CPU torch's products take matrices of all sizes and strides (tried with torch 2.13; single rows need care). On a
CUDA device (`aten/src/ATen/native/cuda/ScaledBlas.cpp`, `Blas.cpp`) they take dense rows of x and of the weight, and
sizes as the constants below say: other matrices are copied, with zeros behind them where sizes do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import LINEAR_OUTPUT, SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

# What both features have to be multiples of.
_SCALED_MULTIPLE = 16
_INTEGER_MULTIPLE = 8
# _int_mm refuses 16 rows and fewer.
_INTEGER_ROWS = 17
# Sums of more products of int8 values, (-128)^2 at most, may leave int32.
MAX_INT8_FEATURES = 2**17 - 1


def _load_scaled(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _scaled(use_fast_accum=False)


def _load_scaled_fast(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _scaled(use_fast_accum=True)


def _scaled(*, use_fast_accum: bool) -> KernelFunction:
    import torch

    output_dtype = getattr(torch, LINEAR_OUTPUT)

    def multiply(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = _rows(x), weight
        height, width = rows.shape[0], columns.shape[0]
        if rows.is_cuda:
            depth = _rounded(rows.shape[1], _SCALED_MULTIPLE)
            rows = _dense(rows, height, depth)
            columns = _dense(columns, _rounded(width, _SCALED_MULTIPLE), depth)
            bias = None if bias is None else _dense(bias[None], 1, columns.shape[0])[0]
        if scale_x.numel() != 1 or scale_w.numel() != 1:
            # All or none are by row. What pads the weight has a scale too.
            scale_x = scale_x.reshape(-1, 1).expand(height, 1).contiguous()
            scale_w = _dense(scale_w.reshape(1, -1).expand(1, width), 1, columns.shape[0])
        result = torch._scaled_mm(
            rows,
            columns.t(),
            scale_x,
            scale_w,
            bias=bias,
            out_dtype=output_dtype,
            use_fast_accum=use_fast_accum,
        )
        if columns.shape[0] != width:
            result = result[:, :width].contiguous()
        return result.view(*x.shape[:-1], width)

    return multiply


def _load_integer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    output_dtype = getattr(torch, LINEAR_OUTPUT)

    def multiply(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = _rows(x), weight
        height, width = rows.shape[0], columns.shape[0]
        if rows.is_cuda:
            depth = _rounded(rows.shape[1], _INTEGER_MULTIPLE)
            rows = _dense(rows, max(height, _INTEGER_ROWS), depth)
            columns = _dense(columns, _rounded(width, _INTEGER_MULTIPLE), depth)
        product = torch._int_mm(_with_stride(rows), _with_stride(columns.t()))[:height, :width]
        scaled = _scaled_back(product, scale_x, scale_w, bias)
        return scaled.to(output_dtype).view(*x.shape[:-1], width)

    return multiply


def _load_widened(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    """A product in bfloat16, which holds all values of float8_e4m3fn and int8."""
    import torch

    wide = getattr(torch, LINEAR_OUTPUT)

    def multiply(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None) -> Tensor:
        scaled = _scaled_back(_rows(x).to(wide) @ weight.to(wide).t(), scale_x, scale_w, bias)
        return scaled.to(wide).view(*x.shape[:-1], weight.shape[0])

    return multiply


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, also one without elements."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _scaled_back(product: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, out_features) in float32."""
    scaled = product.float().mul_(scale_x.reshape(-1, 1)).mul_(scale_w.reshape(1, -1))
    return scaled if bias is None else scaled.add_(bias)


def _rounded(size: int, multiple: int) -> int:
    """The next multiple, at least one of it: of no features the sums are zeros."""
    return max(1, -(-size // multiple)) * multiple


def _with_stride(matrix: Tensor) -> Tensor:
    """The matrix; a single row is given a stride between rows. One of stride 1 is taken for a transposed column, beside
    which _int_mm reads on a CPU (torch 2.13)."""
    return matrix[0][None] if matrix.shape[0] == 1 else matrix


def _dense(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with dense rows, and zeros up to these sizes."""
    if tuple(matrix.shape) == (rows, columns):
        return matrix.contiguous()
    room = matrix.new_zeros(rows, columns)
    room[: matrix.shape[0], : matrix.shape[1]] = matrix
    return room


def _declare(
    kernel_id: str, operation: str, dtype: str, platforms: tuple[str, ...] = ("cpu", "cuda"), **others: Any
) -> KernelSpec:
    return KernelSpec(kernel_id=kernel_id, operations=(operation,), platforms=platforms, dtypes=(dtype,), **others)


_FP8 = ("linear.fp8", "float8_e4m3fn")
_INT8 = ("linear.int8", "int8")
_EXACT = (Limit("in_features", "at_most", MAX_INT8_FEATURES),)
_SCALED_SM = (8, 9)
# Calls that autograd records get what torch gives: a backward through _scaled_mm raises.
_DEFAULT: dict[str, Any] = {"supports_backward": True, "traceable": True, "priority": 100}
KERNELS = (
    Kernel(_declare("torch.scaled_mm", *_FP8, min_sm=_SCALED_SM, **_DEFAULT), _load_scaled),
    Kernel(
        _declare("torch.scaled_mm.fast_accum", *_FP8, platforms=("cuda",), min_sm=_SCALED_SM, priority=20),
        _load_scaled_fast,
    ),
    Kernel(_declare("torch.linear_fp8.widened", *_FP8, traceable=True, priority=40), _load_widened),
    Kernel(_declare("torch.int_mm", *_INT8, extra_limits=_EXACT, **_DEFAULT), _load_integer),
    Kernel(_declare("torch.linear_int8.widened", *_INT8, traceable=True, priority=40), _load_widened),
)
