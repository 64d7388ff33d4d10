"""Linear layers on quantised inputs and weights: `linear.fp8`, `linear.int8`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import LINEAR_OUTPUT, SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import USUAL, Axis, Operation, Sizes, TensorArgument
from layerzero_runtime.tensors import (
    NamedTensors,
    call_features,
    check_tensors,
    common_dtype,
    dtype_name,
    rows_by_width,
)

if TYPE_CHECKING:
    from torch import Tensor

SCALE_DTYPE = "float32"  # the only one that torch._scaled_mm takes
# int8 has no fractions: random values spread over its range. Of a million normal ones less than one lies beyond it.
_INT8_SPREAD = 25.0


def _x_shape(context: SelectionContext) -> Sizes:
    assert context.rows and context.in_features
    return (context.rows, context.in_features)


def _weight_shape(context: SelectionContext) -> Sizes:
    assert context.out_features and context.in_features
    return (context.out_features, context.in_features)


def _scale_x_shape(context: SelectionContext) -> Sizes:
    assert context.rows
    return (context.rows, 1) if context.scale_x == "row" else ()


def _scale_w_shape(context: SelectionContext) -> Sizes:
    assert context.out_features
    return (context.out_features, 1) if context.scale_w == "row" else ()


def _bias_shape(context: SelectionContext) -> Sizes:
    assert context.out_features
    return (context.out_features,)


def _output_shapes(context: SelectionContext) -> tuple[Sizes, ...]:
    assert context.rows and context.out_features
    return ((context.rows, context.out_features),)


def _arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tensors["x"], tensors["weight"], tensors["scale_x"], tensors["scale_w"], tensors.get("bias"))


def _scaling(name: str, scale: Tensor, leading: tuple[int, ...]) -> str:
    """ "row" for a scale per row of a matrix with these leading dimensions, "tensor" for a single one.

    With a trailing 1 the scale of a single row is one per row too, so that a batch of one is of its batch's kind.

    Raises:
        ContextError: it is neither, or not of float32.
    """
    if dtype_name(scale) != SCALE_DTYPE:
        raise ContextError(f"{name} is {dtype_name(scale)}, required {SCALE_DTYPE}; convert it once, not in every call")
    shape = tuple(scale.shape)
    if leading and shape == (*leading, 1):
        return "row"
    if scale.numel() == 1:
        return "tensor"
    if shape == leading:
        return "row"
    per_row = f"{(*leading, 1)} or {leading}" if leading else "(1,)"
    raise ContextError(f"{name} has shape {shape}, required one element, or one for each row: {per_row}")


def _describer(operation: str) -> Callable[..., SelectionContext]:
    def describe(
        x: Tensor,
        weight: Tensor,
        scale_x: Tensor,
        scale_w: Tensor,
        bias: Tensor | None = None,
        *,
        mode: str = "eager",
    ) -> SelectionContext:
        multiplied: NamedTensors = {"x": x, "weight": weight}
        others: NamedTensors = {"scale_x": scale_x, "scale_w": scale_w}
        if bias is not None:
            others["bias"] = bias
        check_tensors({**multiplied, **others})
        rows, in_features = rows_by_width({"x": x})
        if weight.dim() != 2 or weight.shape[1] != in_features:
            raise ContextError(
                f"weight has shape {tuple(weight.shape)}, required (out_features, {in_features}) as in Linear layers: "
                "its second dimension is the last of x"
            )
        out_features = weight.shape[0]
        if bias is not None:
            if tuple(bias.shape) != (out_features,):
                raise ContextError(f"bias has shape {tuple(bias.shape)}, required ({out_features},)")
            if dtype_name(bias) != LINEAR_OUTPUT:
                raise ContextError(f"bias is {dtype_name(bias)}, required {LINEAR_OUTPUT}, the dtype of the result")
        return SelectionContext(
            operation=operation,
            dtype=common_dtype(multiplied),
            mode=mode,
            rows=rows,
            in_features=in_features,
            out_features=out_features,
            scale_x=_scaling("scale_x", scale_x, tuple(x.shape[:-1])),
            scale_w=_scaling("scale_w", scale_w, (out_features,)),
            has_bias=bias is not None,
            **call_features({**multiplied, **others}),
        )

    return describe


def _flops(context: SelectionContext) -> int:
    assert context.rows and context.in_features and context.out_features
    return 2 * context.rows * context.in_features * context.out_features


def reference(
    context: SelectionContext, x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """(x weight^T) x scale_x x scale_w + bias, in the dtype of the scales: quantised values are whole in wider ones."""
    product = x.to(scale_x.dtype) @ weight.to(scale_x.dtype).t()
    by_row = scale_x.reshape(*x.shape[:-1], 1) if context.scale_x == "row" else scale_x.reshape(())
    scaled = product * by_row * scale_w.reshape(-1)
    return (scaled if bias is None else scaled + bias,)


def _declare(name: str, default_kernel: str, spread: float) -> Operation:
    return Operation(
        name=name,
        required=("rows", "in_features", "out_features"),
        static=("scale_x", "scale_w", "has_bias"),
        plain=USUAL,
        fixed=(),
        axes=(Axis("rows"), Axis("in_features"), Axis("out_features")),
        monotone=("rows", "in_features", "out_features"),
        tensors=(
            TensorArgument("x", _x_shape, spread=spread),
            TensorArgument("weight", _weight_shape, spread=spread),
            TensorArgument("scale_x", _scale_x_shape, dtype=lambda context: SCALE_DTYPE, center=1.0, spread=0.1),
            TensorArgument("scale_w", _scale_w_shape, dtype=lambda context: SCALE_DTYPE, center=1.0, spread=0.1),
            TensorArgument(
                "bias",
                _bias_shape,
                dtype=lambda context: LINEAR_OUTPUT,
                present=lambda context: context.has_bias,
            ),
        ),
        outputs=_output_shapes,
        arguments=_arguments,
        describe=_describer(name),
        default_kernel=default_kernel,
        flops=_flops,
        reference=reference,
    )


FP8 = _declare("linear.fp8", "torch.scaled_mm", 1.0)
INT8 = _declare("linear.int8", "torch.int_mm", _INT8_SPREAD)
OPERATIONS = (FP8, INT8)
