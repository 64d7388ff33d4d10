"""Gated activations of MLP blocks: `mlp.swiglu`, `mlp.geglu`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import USUAL, Axis, Operation, Sizes, TensorArgument
from layerzero_runtime.tensors import call_features, common_dtype, rows_by_width

if TYPE_CHECKING:
    from torch import Tensor


def _shape(context: SelectionContext) -> Sizes:
    assert context.rows and context.hidden_size
    return (context.rows, context.hidden_size)


def _arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tensors["gate"], tensors["up"])


def _describe_swiglu(gate: Tensor, up: Tensor, *, mode: str = "eager") -> SelectionContext:
    return _describe("mlp.swiglu", gate, up, mode)


def _describe_geglu(gate: Tensor, up: Tensor, *, approximate: str = "none", mode: str = "eager") -> SelectionContext:
    return _describe("mlp.geglu", gate, up, mode, approximate)


def _describe(operation: str, gate: Tensor, up: Tensor, mode: str, approximate: str = "none") -> SelectionContext:
    tensors = {"gate": gate, "up": up}
    rows, hidden_size = rows_by_width(tensors)
    return SelectionContext(
        operation=operation,
        dtype=common_dtype(tensors),
        mode=mode,
        rows=rows,
        hidden_size=hidden_size,
        approximate=approximate,
        **call_features(tensors),
    )


def _flops(context: SelectionContext) -> int:
    assert context.rows and context.hidden_size
    return 5 * context.rows * context.hidden_size


def reference_swiglu(context: SelectionContext, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """gate x sigmoid(gate) x up."""
    return (gate / (1.0 + (-gate).exp()) * up,)


def reference_geglu(context: SelectionContext, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """GELU(gate) x up; the tanh form is Hendrycks and Gimpel's approximation (arXiv:1606.08415)."""
    if context.approximate == "tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        return (0.5 * gate * (1.0 + inner.tanh()) * up,)
    return (0.5 * gate * (1.0 + (gate / math.sqrt(2.0)).erf()) * up,)


_AXES = (Axis("rows"), Axis("hidden_size"))
_TENSORS = (TensorArgument("gate", _shape), TensorArgument("up", _shape))
_REQUIRED = ("rows", "hidden_size")

SWIGLU = Operation(
    name="mlp.swiglu",
    required=_REQUIRED,
    static=(),
    plain=USUAL,
    fixed=(),
    axes=_AXES,
    monotone=("rows", "hidden_size"),
    tensors=_TENSORS,
    outputs=lambda context: (_shape(context),),
    arguments=_arguments,
    describe=_describe_swiglu,
    default_kernel="torch.swiglu",
    flops=_flops,
    reference=reference_swiglu,
)
GEGLU = Operation(
    name="mlp.geglu",
    required=_REQUIRED,
    static=("approximate",),
    plain=USUAL,
    fixed=(),
    axes=_AXES,
    monotone=("rows", "hidden_size"),
    tensors=_TENSORS,
    outputs=lambda context: (_shape(context),),
    arguments=_arguments,
    describe=_describe_geglu,
    default_kernel="torch.geglu",
    flops=_flops,
    reference=reference_geglu,
)
OPERATIONS = (SWIGLU, GEGLU)
