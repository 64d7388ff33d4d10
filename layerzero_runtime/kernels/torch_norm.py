"""torch's norms: the fused functions as users call them, and forms written out with `vector_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("float64", "float32", "float16", "bfloat16")


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import rms_norm

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        output: Tensor = rms_norm(x, x.shape[-1:], weight, eps)
        return output

    def normalise_offset(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        return rms_norm(x, x.shape[-1:], None if weight is None else weight + offset, eps)

    return normalise_offset if context.offset else normalise


def _load_rms_fused(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _fused_rms_norm as fused

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        output: Tensor = fused(x, x.shape[-1:], weight, eps)[0]
        return output

    return normalise


def _load_rms_vector_norm(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    scale = _load_row_scale(context)
    has_weight, baked_offset = context.has_weight, context.offset

    def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        output: Tensor = x * scale(x, eps)
        if has_weight:
            output.mul_(weight + baked_offset if baked_offset else weight)
        return output

    return normalise


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import rms_norm

    def normalise(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm(total, total.shape[-1:], weight, eps), total

    return normalise


def _load_add_rms_vector_norm(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    scale = _load_row_scale(context)
    has_weight = context.has_weight

    def normalise(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        output = total * scale(total, eps)
        return output.mul_(weight) if has_weight else output, total

    return normalise


def _load_row_scale(context: SelectionContext) -> KernelFunction:
    """1/sqrt(mean(x^2) + eps) of each row, in x's dtype; the norm is taken in float32 or, for float64, in float64."""
    import torch
    from torch.linalg import vector_norm

    dtype = getattr(torch, context.dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def scale(x: Tensor, eps: float) -> Tensor:
        norm: Tensor = vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_().to(dtype)

    return scale


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import layer_norm

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weight, bias, eps)

    return normalise


def _load_layer_vector_norm(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    """Centred rows and their norm, in float32 or float64."""
    import torch
    from torch.linalg import vector_norm

    dtype = getattr(torch, context.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    has_weight, has_bias = context.has_weight, context.has_bias

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.to(wide)
        output = rows - rows.mean(dim=-1, keepdim=True)
        norm = vector_norm(output, dim=-1, keepdim=True)
        output.mul_(norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_())
        if has_weight:
            output.mul_(weight)
        if has_bias:
            output.add_(bias)
        return output.to(dtype)

    return normalise


def _default(kernel_id: str, operation: str) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cpu", "cuda"),
        dtypes=_DTYPES,
        supports_mixed_weight_dtype=True,
        supports_backward=True,
        traceable=True,
        priority=100,
    )


def _written_out(kernel_id: str, operation: str) -> KernelSpec:
    # Works in place on what autograd would need: no gradients.
    return KernelSpec(kernel_id=kernel_id, operations=(operation,), platforms=("cpu",), dtypes=_DTYPES, traceable=True)


_RMS_FUSED = KernelSpec(
    kernel_id="torch.rms_norm.fused",
    operations=("norm.rms",),
    platforms=("cpu",),
    dtypes=_DTYPES,
    supports_offset=False,
    supports_mixed_weight_dtype=True,
    supports_backward=True,
    traced_as="torch.rms_norm",  # which becomes this function when a graph is lowered; Dynamo does not know its name
    priority=60,
)

KERNELS = (
    Kernel(_default("torch.rms_norm", "norm.rms"), _load_rms),
    Kernel(_RMS_FUSED, _load_rms_fused),
    Kernel(_written_out("torch.rms_norm.vector_norm", "norm.rms"), _load_rms_vector_norm),
    Kernel(_default("torch.add_rms_norm", "norm.add_rms"), _load_add_rms),
    Kernel(_written_out("torch.add_rms_norm.vector_norm", "norm.add_rms"), _load_add_rms_vector_norm),
    Kernel(_default("torch.layer_norm", "norm.layer"), _load_layer),
    Kernel(_written_out("torch.layer_norm.vector_norm", "norm.layer"), _load_layer_vector_norm),
)
