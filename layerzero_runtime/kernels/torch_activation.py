"""Gated activations written out in torch: with a product of its own, and with the product in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor


def _load_swiglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import silu

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    return activate


def _load_swiglu_in_place(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import silu

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate).mul_(up)

    return activate


def _load_geglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import gelu

    approximate = context.approximate

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return gelu(gate, approximate=approximate) * up

    return activate


def _load_geglu_in_place(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import gelu

    approximate = context.approximate

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return gelu(gate, approximate=approximate).mul_(up)

    return activate


def _declare(kernel_id: str, operation: str, platforms: tuple[str, ...], priority: int) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=platforms,
        dtypes=("float64", "float32", "float16", "bfloat16"),
        supports_backward=True,
        traceable=True,
        priority=priority,
    )


KERNELS = (
    Kernel(_declare("torch.swiglu", "mlp.swiglu", ("cpu", "cuda"), 100), _load_swiglu),
    Kernel(_declare("torch.swiglu.in_place", "mlp.swiglu", ("cpu", "cuda"), 50), _load_swiglu_in_place),
    Kernel(_declare("torch.geglu", "mlp.geglu", ("cpu", "cuda"), 100), _load_geglu),
    Kernel(_declare("torch.geglu.in_place", "mlp.geglu", ("cpu", "cuda"), 50), _load_geglu_in_place),
)
