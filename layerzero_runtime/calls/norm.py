"""`rms_norm`, `add_rms_norm`, `layer_norm`."""

from __future__ import annotations

import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from layerzero_runtime.calls.guards import rows_keeper
from layerzero_runtime.calls.interception import deterministic, function_mode
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.integrations import traced
from layerzero_runtime.operations.norm import ADD_RMS, LAYER, LAYER_EPS, RMS, RMS_EPS
from layerzero_runtime.serving.published import PUBLISHED


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = RMS_EPS, offset: float = 0.0) -> Tensor:
    """Root mean square normalisation over the last dimension: x / sqrt(mean(x^2) + eps) x (weight + offset).

    Args:
        x: (..., hidden_size).
        weight: (hidden_size,), or None for ones.
        eps: added to the mean square.
        offset: added to the weight; Gemma's models store weight - 1 and take 1.0.

    Returns:
        A tensor of x's shape, as `torch.nn.functional.rms_norm` gives it.

    Raises:
        ContextError: shapes or devices do not fit together.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        return traced("norm.rms", (x, weight, eps, offset), {})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        for guard, kept_offset, width, decide, functions, count_call, recover in seen.rms_norm:
            if guard(x, weight) and offset == kept_offset and (rows := x.numel() // width):
                count_call()
                try:
                    return functions[decide(rows, width)](x, weight, eps, offset)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, (x, weight, eps, offset))  # type: ignore[no-any-return]
    keep = rows_keeper("rms_norm", (x, weight), offset)
    result: Tensor = serve(current_snapshot(), RMS, (x, weight, eps, offset), {}, {"offset": offset}, keep)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = RMS_EPS) -> tuple[Tensor, Tensor]:
    """The residual stream's sum and its root mean square normalisation, out of place.

    Args:
        x: (..., hidden_size).
        residual: same shape, dtype and device as x.
        weight: (hidden_size,), or None for ones.
        eps: added to the mean square.

    Returns:
        (rms_norm(x + residual), x + residual).

    Raises:
        ContextError: shapes, dtypes or devices do not fit together.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        return traced("norm.add_rms", (x, residual, weight, eps), {})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        for guard, width, decide, functions, count_call, recover in seen.add_rms_norm:
            if guard(x, residual, weight) and x.shape == residual.shape and (rows := x.numel() // width):
                count_call()
                try:
                    return functions[decide(rows, width)](x, residual, weight, eps)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, (x, residual, weight, eps))  # type: ignore[no-any-return]
    keep = rows_keeper("add_rms_norm", (x, residual, weight))
    result: tuple[Tensor, Tensor] = serve(current_snapshot(), ADD_RMS, (x, residual, weight, eps), {}, keep=keep)
    return result


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = LAYER_EPS) -> Tensor:
    """Layer normalisation over the last dimension.

    Args:
        x: (..., hidden_size).
        weight: (hidden_size,), or None for ones.
        bias: (hidden_size,), or None for zeros.
        eps: added to the variance.

    Returns:
        A tensor of x's shape, as `torch.nn.functional.layer_norm` gives it.

    Raises:
        ContextError: shapes or devices do not fit together.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        return traced("norm.layer", (x, weight, bias, eps), {})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        for guard, width, decide, functions, count_call, recover in seen.layer_norm:
            if guard(x, weight, bias) and (rows := x.numel() // width):
                count_call()
                try:
                    return functions[decide(rows, width)](x, weight, bias, eps)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, (x, weight, bias, eps))  # type: ignore[no-any-return]
    keep = rows_keeper("layer_norm", (x, weight, bias))
    result: Tensor = serve(current_snapshot(), LAYER, (x, weight, bias, eps), {}, keep=keep)
    return result
