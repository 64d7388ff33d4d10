"""Normalisations over the last dimension: `norm.rms`, `norm.add_rms`, `norm.layer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import USUAL, Axis, Operation, Sizes, TensorArgument
from layerzero_runtime.tensors import call_features, check_tensors, common_dtype, rows_by_width

if TYPE_CHECKING:
    from torch import Tensor

RMS_EPS = 1e-6  # Llama's and Gemma's rms_norm_eps
LAYER_EPS = 1e-5  # torch.nn.LayerNorm's default


def _rows(context: SelectionContext) -> Sizes:
    assert context.rows and context.hidden_size
    return (context.rows, context.hidden_size)


def _width(context: SelectionContext) -> Sizes:
    assert context.hidden_size
    return (context.hidden_size,)


def _rms_arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tensors["x"], tensors.get("weight"), RMS_EPS, context.offset)


def _add_rms_arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tensors["x"], tensors["residual"], tensors.get("weight"), RMS_EPS)


def _layer_arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tensors["x"], tensors.get("weight"), tensors.get("bias"), LAYER_EPS)


def _describe(
    operation: str,
    tensors: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mode: str,
    offset: float = 0.0,
) -> SelectionContext:
    """The context of a norm over the last dimension of tensors of one shape.

    Raises:
        ContextError: shapes, dtypes or devices do not fit together.
        ContextTypeError: an argument is no tensor.
    """
    rows, hidden_size = rows_by_width(tensors)
    parameters = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    check_tensors(parameters)
    for name, tensor in parameters.items():
        if tuple(tensor.shape) != (hidden_size,):
            raise ContextError(f"{name} has shape {tuple(tensor.shape)}, required ({hidden_size},)")
    return SelectionContext(
        operation=operation,
        dtype=common_dtype(tensors),
        mode=mode,
        rows=rows,
        hidden_size=hidden_size,
        weight_dtype=common_dtype(parameters) if parameters else "",
        offset=offset,
        has_weight=weight is not None,
        has_bias=bias is not None,
        **call_features({**tensors, **parameters}),
    )


def _describe_rms(
    x: Tensor, weight: Tensor | None, eps: float = RMS_EPS, offset: float = 0.0, *, mode: str = "eager"
) -> SelectionContext:
    return _describe("norm.rms", {"x": x}, weight, None, mode, offset)


def _describe_add_rms(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = RMS_EPS, *, mode: str = "eager"
) -> SelectionContext:
    return _describe("norm.add_rms", {"x": x, "residual": residual}, weight, None, mode)


def _describe_layer(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = LAYER_EPS, *, mode: str = "eager"
) -> SelectionContext:
    return _describe("norm.layer", {"x": x}, weight, bias, mode)


def _elements(context: SelectionContext) -> int:
    assert context.rows and context.hidden_size
    return context.rows * context.hidden_size


def reference_rms(
    context: SelectionContext, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, ...]:
    """x / sqrt(mean(x^2) + eps) x (weight + offset)."""
    normalised = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (normalised if weight is None else normalised * (weight + offset),)


def reference_add_rms(
    context: SelectionContext, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """The residual sum, rounded once to the call's dtype as every implementation does, and its RMS norm."""
    import torch

    total = (x + residual).to(getattr(torch, context.dtype)).to(x.dtype)
    return (*reference_rms(context, total, weight, eps, 0.0), total)


def reference_layer(
    context: SelectionContext, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """(x - mean) / sqrt(variance + eps) x weight + bias, with the population variance."""
    centered = x - x.mean(dim=-1, keepdim=True)
    output = centered / (centered.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        output = output * weight
    return (output if bias is None else output + bias,)


_X = TensorArgument("x", _rows)
_WEIGHT = TensorArgument(
    "weight",
    _width,
    dtype=lambda context: context.weight_dtype,
    present=lambda context: context.has_weight,
    center=1.0,
    spread=0.1,
)
_PLAIN = {"mixed_weight_dtype": None, "has_weight": True, **USUAL}
_AXES = (Axis("rows"), Axis("hidden_size"))
_REQUIRED = ("rows", "hidden_size")

RMS = Operation(
    name="norm.rms",
    required=_REQUIRED,
    static=("offset",),
    plain=_PLAIN,
    fixed=(),
    axes=_AXES,
    monotone=("rows", "hidden_size"),
    tensors=(_X, _WEIGHT),
    outputs=lambda context: (_rows(context),),
    arguments=_rms_arguments,
    describe=_describe_rms,
    default_kernel="torch.rms_norm",
    flops=lambda context: 4 * _elements(context),
    reference=reference_rms,
)
ADD_RMS = Operation(
    name="norm.add_rms",
    required=_REQUIRED,
    static=(),
    plain=_PLAIN,
    fixed=(),
    axes=_AXES,
    monotone=("rows", "hidden_size"),
    tensors=(_X, TensorArgument("residual", _rows), _WEIGHT),
    outputs=lambda context: (_rows(context), _rows(context)),
    arguments=_add_rms_arguments,
    describe=_describe_add_rms,
    default_kernel="torch.add_rms_norm",
    flops=lambda context: 5 * _elements(context),
    reference=reference_add_rms,
)
LAYER = Operation(
    name="norm.layer",
    required=_REQUIRED,
    static=("has_bias",),
    plain=_PLAIN,
    fixed=(),
    axes=_AXES,
    monotone=("rows", "hidden_size"),
    tensors=(
        _X,
        _WEIGHT,
        TensorArgument(
            "bias",
            _width,
            dtype=lambda context: context.weight_dtype,
            present=lambda context: context.has_bias,
            spread=0.1,
        ),
    ),
    outputs=lambda context: (_rows(context),),
    arguments=_layer_arguments,
    describe=_describe_layer,
    default_kernel="torch.layer_norm",
    flops=lambda context: 7 * _elements(context),
    reference=reference_layer,
)
OPERATIONS = (RMS, ADD_RMS, LAYER)
