"""The way of a call that the fast path of its function does not know."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from layerzero_runtime.calls.empty import empty_outputs
from layerzero_runtime.calls.interception import is_intercepted
from layerzero_runtime.operation import Operation
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import MAX_ROUTES, Snapshot
from layerzero_runtime.tensors import gradients_needed

# Types of devices, as torch names them, that `detect_device` knows.
DESCRIBED_DEVICES = ("cpu", "cuda")


def serve(
    snapshot: Snapshot,
    operation: Operation,
    arguments: tuple[Any, ...],
    features: Mapping[str, Any],
    fast_key: tuple[Hashable, ...] | None = None,
    default_features: Mapping[str, Any] | None = None,
) -> Any:
    """Serve a call whose features have to be read one by one.

    Args:
        arguments: positional arguments of the operation's kernels.
        features: what `operation.describe` takes by keyword.
        fast_key: where the function's fast path will find the route again.
        default_features: fields that the default's loader needs beside `features`. The default takes intercepted calls,
            those on devices that cannot be described, and empty ones whose result does not follow from the shapes; what
            they lack, torch itself reports.

    Raises:
        ContextError: the arguments do not fit together.
        NoKernelAvailableError: no registered kernel accepts the call.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    undescribed = _why_undescribed(tensors)
    if undescribed is not None:
        snapshot.counters.raise_by_one(undescribed)
        if undescribed == "empty" and not gradients_needed(*tensors):
            outputs = empty_outputs(operation, tensors, features.get("layout"))
            if outputs is not None:
                return outputs if len(outputs) > 1 else outputs[0]
        default = snapshot.default(operation, {**features, **(default_features or {})})
        return default.function(*arguments)
    if PUBLISHED.special:
        # Only here: the fast paths, which leave such calls to this function, know eager calls alone.
        features, fast_key = {**features, "mode": current_mode()}, None
    context = operation.describe(*arguments, **features)
    route = snapshot.route(operation, context, features)
    if fast_key is not None and len(snapshot.fast_routes) < MAX_ROUTES:
        snapshot.fast_routes[fast_key] = route
    route.count_call()
    try:
        return route.functions[route.decide(*operation.sizes(context))](*arguments)
    except Exception as error:  # noqa: BLE001 - recover judges it
        return route.recover(error, arguments)


def _why_undescribed(tensors: list[Tensor]) -> str | None:
    """The counter of calls like this one, which no context describes; None for the others."""
    if is_intercepted(*tensors):
        return "intercepted"
    if any(tensor.numel() == 0 for tensor in tensors):
        return "empty"
    if tensors and all(tensor.device.type not in DESCRIBED_DEVICES for tensor in tensors):
        return "other_devices"
    return None
