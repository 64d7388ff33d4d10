"""`linear_fp8`, `linear_int8`."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from layerzero_runtime.calls.guards import Keeper, tensor_guard
from layerzero_runtime.calls.interception import deterministic, function_mode
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.integrations import traced
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations.linear import FP8, INT8
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.serving.seen_calls import SeenCalls


def linear_fp8(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x weight^T) x scale_x x scale_w + bias, of matrices in float8_e4m3fn.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), as `torch.nn.Linear` has it.
        scale_x: float32, one element, or one for each row of x: (..., 1) or (...). Scales per row should have the
            trailing 1: that of a single row is then one of them too.
        scale_w: float32, one element, or one for each output channel: (out_features, 1) or (out_features,).
        bias: (out_features,) in bfloat16, or None.

    Returns:
        A tensor (..., out_features) in bfloat16, as `torch._scaled_mm` gives it. It is for inference: torch has no
        derivative of the product.

    Raises:
        ContextError: shapes, dtypes or devices do not fit together.
        NoKernelAvailableError: no kernel accepts the call.
    """
    return _linear(FP8, "linear_fp8", (x, weight, scale_x, scale_w, bias))


def linear_int8(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x weight^T) x scale_x x scale_w + bias, of matrices in int8: their product is exact.

    Args:
        x: (..., in_features), of at most 131,071 features.
        weight, scale_x, scale_w, bias: as for `linear_fp8`.

    Returns:
        A tensor (..., out_features) in bfloat16, as `torch._int_mm` and a scaling in float32 give it.

    Raises:
        ContextError: shapes, dtypes or devices do not fit together.
        NoKernelAvailableError: no kernel accepts the call.
    """
    return _linear(INT8, "linear_int8", (x, weight, scale_x, scale_w, bias))


def _linear(operation: Operation, function: str, arguments: tuple[Any, ...]) -> Tensor:
    if is_dynamo_compiling():
        return traced(operation.name, arguments, {})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        x, _, scale_x, _, bias = arguments
        tensors = arguments if bias is not None else arguments[:4]
        for guard, count, dims, sizes, decide, functions, count_call, recover in getattr(seen, function):
            if (
                len(tensors) == count
                and guard(*tensors)
                and (not dims or x.shape[:-1] == scale_x.shape[:dims])
                and (rows := x.numel() // sizes[0])
            ):
                count_call()
                try:
                    return functions[decide(rows, *sizes)](*arguments)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, arguments)  # type: ignore[no-any-return]
    result: Tensor = serve(current_snapshot(), operation, arguments, {}, keep=_keeper(function, arguments))
    return result


def _keeper(function: str, arguments: tuple[Any, ...]) -> Keeper:
    """What keeps the kind of a call: all sizes of its tensors are fixed but the rows.

    A kind is (guard, number of tensors, leading dimensions of a scale per row of x or 0, (in_features, out_features),
    decide, functions, count_call, recover).
    """
    tensors = [argument for argument in arguments if argument is not None]

    def keep(seen: SeenCalls, route: Route) -> None:
        x, weight, scale_x = tensors[:3]
        dims = x.dim() - 1 if _is_by_row(x, scale_x) else 0
        sizes: list[list[int | None]] = [list(tensor.shape) for tensor in tensors]
        sizes[0][:-1] = [None] * (x.dim() - 1)
        sizes[2][:dims] = [None] * dims
        features = (x.shape[-1], weight.shape[0])
        parts = (route.decide, route.functions, route.count_call, route.recover)
        seen.keep(function, (tensor_guard(tensors, sizes), len(tensors), dims, features, *parts))

    return keep


def _is_by_row(x: Tensor, scale_x: Tensor) -> bool:
    """As `operations.linear` tells it, of a call that was described."""
    leading = x.shape[:-1]
    return bool(leading) and (scale_x.shape == (*leading, 1) or (scale_x.numel() > 1 and scale_x.shape == leading))
