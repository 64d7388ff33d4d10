"""`swiglu`, `geglu`."""

from __future__ import annotations

import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from layerzero_runtime.calls.guards import rows_keeper
from layerzero_runtime.calls.interception import deterministic, function_mode
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.integrations import traced
from layerzero_runtime.operations.mlp import GEGLU, SWIGLU
from layerzero_runtime.serving.published import PUBLISHED


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up.

    Args:
        gate: any shape with at least one dimension.
        up: same shape, dtype and device.

    Raises:
        ContextError: shapes, dtypes or devices differ.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        return traced("mlp.swiglu", (gate, up), {})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        for guard, width, decide, functions, count_call, recover in seen.swiglu:
            if guard(gate, up) and gate.shape == up.shape and (rows := gate.numel() // width):
                count_call()
                try:
                    return functions[decide(rows, width)](gate, up)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, (gate, up))  # type: ignore[no-any-return]
    keep = rows_keeper("swiglu", (gate, up))
    result: Tensor = serve(current_snapshot(), SWIGLU, (gate, up), {}, keep=keep)
    return result


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) x up.

    Args:
        gate: any shape with at least one dimension.
        up: same shape, dtype and device.
        approximate: "none" for the error function, "tanh" for its approximation, as in torch.

    Raises:
        ContextError: shapes, dtypes or devices differ, or `approximate` is neither.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        return traced("mlp.geglu", (gate, up), {"approximate": approximate})  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if seen is not None and not (function_mode() or deterministic()) and forward_mode._current_level < 0:
        for guard, kept_approximate, width, decide, functions, count_call, recover in seen.geglu:
            if (
                guard(gate, up)
                and approximate == kept_approximate
                and gate.shape == up.shape
                and (rows := gate.numel() // width)
            ):
                count_call()
                try:
                    return functions[decide(rows, width)](gate, up)  # type: ignore[no-any-return]
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return recover(error, (gate, up))  # type: ignore[no-any-return]
    keep = rows_keeper("geglu", (gate, up), approximate)
    result: Tensor = serve(current_snapshot(), GEGLU, (gate, up), {"approximate": approximate}, keep=keep)
    return result
