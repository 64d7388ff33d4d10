"""`swiglu`, `geglu`."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from layerzero_runtime.calls.interception import (
    autocast,
    cuda_device,
    deterministic,
    dispatch_modes,
    function_modes,
    grad_enabled,
    transforms,
)
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.operation import Operation
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
    snapshot = PUBLISHED.eager
    key = None
    if (
        snapshot is not None
        and type(gate) is Tensor
        and type(up) is Tensor
        # As `is_intercepted` has it, written out: a call and a loop would cost more than the checks.
        and not (function_modes() or dispatch_modes() or autocast() or deterministic())
        and transforms() is None
        and forward_mode._current_level < 0
        and not (grad_enabled() and (gate.requires_grad or up.requires_grad))
        and (dtype := gate.dtype) is up.dtype
    ):
        device = "cpu" if gate.is_cpu and up.is_cpu else cuda_device(gate, up)
        if device is not None:
            key = (operation.name, dtype, device, *features.values())
            route = snapshot.fast_routes.get(key)
            shape = gate.shape
            if route is not None and shape and shape == up.shape and (elements := gate.numel()):
                width = shape[-1]
                route.count_call()
                try:
                    output: Tensor = route.functions[route.decide(elements // width, width)](gate, up)
                except Exception as error:  # noqa: BLE001 - recover judges it
                    output = route.recover(error, (gate, up))
                return output
    result: Tensor = serve(current_snapshot(), operation, (gate, up), features, key)
    return result
