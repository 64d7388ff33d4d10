"""torch's fused norms on CUDA devices by their bindings, which cost less on the host than the functions around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _fused_rms_norm as fused

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        output: Tensor = fused(x, x.shape[-1:], weight, eps)[0]
        return output

    def normalise_offset(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        output: Tensor = fused(x, x.shape[-1:], None if weight is None else weight + offset, eps)[0]
        return output

    return normalise_offset if context.offset else normalise


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _fused_rms_norm as fused

    def normalise(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return fused(total, total.shape[-1:], weight, eps)[0], total

    return normalise


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import native_layer_norm

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        output: Tensor = native_layer_norm(x, x.shape[-1:], weight, bias, eps)[0]
        return output

    return normalise


def _declare(kernel_id: str, operation: str, traced_as: str) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=("float64", "float32", "float16", "bfloat16"),
        min_version="2.11",  # the oldest that was tried
        supports_backward=True,
        traced_as=traced_as,  # which becomes this function when a graph is lowered
        priority=60,
    )


# Weights of another dtype are left to the functions around these, which write the norm out for them.
KERNELS = (
    Kernel(_declare("torch.rms_norm.fused_cuda", "norm.rms", "torch.rms_norm"), _load_rms),
    Kernel(_declare("torch.add_rms_norm.fused_cuda", "norm.add_rms", "torch.add_rms_norm"), _load_add_rms),
    Kernel(_declare("torch.layer_norm.native", "norm.layer", "torch.layer_norm"), _load_layer),
)
