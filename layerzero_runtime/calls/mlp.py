"""`swiglu`, `geglu`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from layerzero_runtime.calls.interception import is_plain
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations.mlp import GEGLU, SWIGLU


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up.

    Args:
        gate: any shape with at least one dimension.
        up: same shape, dtype and device.

    Raises:
        ContextError: shapes, dtypes or devices differ.
        NoKernelAvailableError: no kernel accepts the call.
    """
    return _gated(SWIGLU, gate, up, {})


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
    return _gated(GEGLU, gate, up, {"approximate": approximate})


def _gated(operation: Operation, gate: Tensor, up: Tensor, features: dict[str, Any]) -> Tensor:
    snapshot = current_snapshot()
    key = None
    if is_plain(gate, up) and gate.dtype == up.dtype:
        key = (operation.name, gate.dtype, gate.device, up.device, *features.values())
        route = snapshot.fast_routes.get(key)
        shape = gate.shape
        if route is not None and shape and shape == up.shape and (elements := gate.numel()):
            width = shape[-1]
            route.calls.raise_by_one()
            try:
                output: Tensor = route.functions[route.decide(elements // width, width)](gate, up)
            except Exception as error:  # noqa: BLE001 - recover judges it
                output = route.recover(error, (gate, up))
            return output
    result: Tensor = serve(snapshot, operation, (gate, up), features, key)
    return result
