"""Quack's norms, written in the CuTe DSL: their forward functions, without the autograd function around them.

Limits are those of quack-kernels 0.6.5, in `rmsnorm.py`, `rmsnorm_config.py` and `reduction_base.py`. It compiles for
each width, in about half a second, and keeps the code on disk.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.library_calls import aligned, guarded
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from quack.rmsnorm import rmsnorm_fwd

    # It is part of the compiled code, and nothing without a weight, as in torch's.
    weight_offset = context.offset if context.has_weight else 0.0

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        rows = _rows(x)
        output: Tensor = rmsnorm_fwd(rows, _vector(weight), eps=eps, weight_offset=weight_offset)[0]
        return output if rows.shape == x.shape else output.view(x.shape)

    return guarded("quack.rms_norm", normalise, _width, context)


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from quack.rmsnorm import rmsnorm_fwd

    def normalise(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        output, total, _ = rmsnorm_fwd(rows, _vector(weight), residual=_rows(residual), eps=eps)
        return (output, total) if rows.shape == x.shape else (output.view(x.shape), total.view(x.shape))

    return guarded("quack.add_rms_norm", normalise, _width, context)


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from quack.rmsnorm import layernorm_fwd

    def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        rows = _rows(x)
        # It takes vectors in float32 alone.
        wide_bias = None if bias is None else aligned(bias.float())
        output: Tensor = layernorm_fwd(rows, aligned(weight.float()), wide_bias, eps)
        return output if rows.shape == x.shape else output.view(x.shape)

    return guarded("quack.layer_norm", normalise, _width, context)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, at an address that the compiled code takes."""
    return aligned(x if x.dim() == 2 else x.view(-1, x.shape[-1]))


def _vector(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else aligned(weight)


def _width(x: Tensor, *others: Any) -> Hashable:
    return x.shape[-1]


def _declare(kernel_id: str, operation: str, max_hidden_size: int, *limits: Limit) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
        library="quack-kernels",
        requires=("torch", "quack"),
        min_version="0.6.5",  # the oldest that was tried
        min_sm=(9, 0),  # rows beyond 16,384 are shared out in a cluster
        max_hidden_size=max_hidden_size,
        hidden_size_multiple=2,  # rows are copied asynchronously, at least 4 bytes at a time
        supports_mixed_weight_dtype=True,
        requires_contiguous=True,
        compiles=True,
        priority=20,
        extra_limits=(
            *limits,
            Limit("mixed_weight_dtype", "one_of", (None, "float32", "float16", "bfloat16")),
            Limit("rows", "at_most", 2**31 - 1),  # counted in 32 bits
        ),
    )


# A block keeps its part of x, and of the residual, in 227 KiB of shared memory: up to 32,768 float32 of one of them.
_RMS = _declare("quack.rms_norm", "norm.rms", 65536)
_ADD_RMS = _declare("quack.add_rms_norm", "norm.add_rms", 16384)
_LAYER = _declare("quack.layer_norm", "norm.layer", 65536, Limit("has_weight", "one_of", (True,)))
_SOURCES = ("library_calls.py",)
KERNELS = (
    Kernel(_RMS, _load_rms, sources=_SOURCES),
    Kernel(_ADD_RMS, _load_add_rms, sources=_SOURCES),
    Kernel(_LAYER, _load_layer, sources=_SOURCES),
)
