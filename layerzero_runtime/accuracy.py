"""What a right result is: its form, and how far its values may lie from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Sizes

# The floor of the tolerance, in unit roundoffs of the call's dtype (half of torch.finfo(dtype).eps, the largest
# relative error of one rounding; Higham, Accuracy and Stability of Numerical Algorithms, section 2.1).
# 16-bit types: kernels sum in float32, so that only what they store is rounded; one rounding of every result has a
# relative L2 error below half a unit, and one more of the softmax weights or of a gate stays below one. An int8
# attention (1.1e-2 in bfloat16) stays outside.
# float32 and float64: there is no wider sum to hide in. exp, erf and rsqrt are good to 1 unit in the last place (2 unit
# roundoffs), and sums in another order walk at random by about as much again.
FLOOR_ROUNDOFFS: Mapping[str, int] = MappingProxyType({"float64": 4, "float32": 4, "float16": 1, "bfloat16": 1})
# Beside the floor: the errors of two implementations of one accuracy differ by less than this factor.
DEFAULT_ERROR_FACTOR = 2.0


def error_floor(dtype: str) -> float:
    """The relative L2 error allowed to a kernel beside a default that has none.

    Raises:
        ContextError: no floor is defined for the dtype.
    """
    import torch

    if dtype not in FLOOR_ROUNDOFFS:
        raise ContextError(f"dtype is {dtype!r}, correctness is defined for: {', '.join(FLOOR_ROUNDOFFS)}")
    return FLOOR_ROUNDOFFS[dtype] * torch.finfo(getattr(torch, dtype)).eps / 2


def output_fault(outputs: Sequence[Any], shapes: Sequence[Sizes], dtype: str | None) -> str | None:
    """What is wrong with the form of a kernel's results, None if nothing is; without a dtype any will do."""
    import torch

    if len(outputs) != len(shapes):
        return f"gives {len(outputs)} outputs, required {len(shapes)}"
    for index, (output, shape) in enumerate(zip(outputs, shapes, strict=True)):
        if not isinstance(output, torch.Tensor):
            return f"output {index} is a {type(output).__name__}, required a tensor"
        if tuple(output.shape) != shape:
            return f"output {index} has shape {tuple(output.shape)}, required {shape}"
        if dtype is not None and output.dtype != getattr(torch, dtype):
            return f"output {index} has dtype {str(output.dtype).removeprefix('torch.')}, required {dtype}"
    return None
