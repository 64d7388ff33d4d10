"""Adapters of other libraries' norms and activations, and calls of them on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement, unfit_version
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.measure.correctness import Check, judge, tolerances
from layerzero_tune.measure.inputs import RandomTensors
from tests.runtime.kernel_calls import KERNELS


def is_installed(kernel: Kernel) -> bool:
    spec = kernel.spec
    return missing_requirement(spec.requires) is None and unfit_version(spec.library, spec.min_version) is None


ROW_OPERATIONS = ("norm.rms", "norm.add_rms", "norm.layer", "mlp.swiglu", "mlp.geglu")
DEFAULTS = {OPERATIONS[operation].default_kernel for operation in ROW_OPERATIONS}
# Triton kernels of our own have tests of their own.
ADAPTERS = [
    kernel
    for kernel_id, kernel in KERNELS.items()
    if kernel.spec.operations[0] in ROW_OPERATIONS
    and "cuda" in kernel.spec.platforms
    and kernel.spec.library != "triton"
    and kernel_id not in DEFAULTS
]
EACH = [
    pytest.param(
        kernel,
        id=kernel.kernel_id,
        marks=pytest.mark.skipif(not is_installed(kernel), reason=f"{kernel.spec.library} is not installed"),
    )
    for kernel in ADAPTERS
]
BY_ID = {str(param.id): param for param in EACH}
DTYPES = ("bfloat16", "float16", "float32")


def context_of(kernel: Kernel, dtype: str, rows: int, width: int, **fields: Any) -> SelectionContext:
    """That of a call which the kernel accepts but for its sizes."""
    operation = kernel.spec.operations[0]
    fields = {
        "has_bias": operation == "norm.layer",
        "approximate": "tanh" if operation == "mlp.geglu" else "none",
        **fields,
    }
    device = detect_device("cuda")
    return SelectionContext(operation=operation, dtype=dtype, rows=rows, hidden_size=width, device=device, **fields)


def accepts(kernel: Kernel, context: SelectionContext) -> bool:
    return not rejections(kernel.spec.limits, context)


def fault(kernel: Kernel, context: SelectionContext, seed: int = 0) -> str:
    """What the tuner finds wrong with the kernel's result; "" for a right one.

    Twice the error of the default counts as right.
    """
    operation = OPERATIONS[context.operation]
    check = Check.prepare(operation, context, RandomTensors("cuda", seed), seed)
    default = check.run(default_of(context))
    return judge(check.run(kernel.load(context, {})), tolerances(default, context.result_dtype)).message


def default_of(context: SelectionContext) -> Any:
    function = KERNELS[OPERATIONS[context.operation].default_kernel].load(context, {})
    if context.operation != "norm.layer" or context.mixed_weight_dtype is None:
        return function

    def in_one_dtype(x: torch.Tensor, *others: Any) -> torch.Tensor:
        # torch's refuses another dtype of the weight on CUDA devices.
        alike = (part.to(x.dtype) if isinstance(part, torch.Tensor) else part for part in others)
        output: torch.Tensor = function(x, *alike)
        return output

    return in_one_dtype


def draw(context: SelectionContext, seed: int = 0) -> tuple[Any, ...]:
    operation = OPERATIONS[context.operation]
    return operation.arguments(context, RandomTensors("cuda", seed).draw(operation, context))


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def reference(context: SelectionContext, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    wide = (part.double() if isinstance(part, torch.Tensor) else part for part in arguments)
    return OPERATIONS[context.operation].reference(context, *wide)


def is_matrix(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dim() > 1
