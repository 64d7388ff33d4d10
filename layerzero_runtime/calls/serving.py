"""The way of a call of a kind that its function has not seen."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from layerzero_runtime.calls.empty import empty_outputs
from layerzero_runtime.calls.guards import Keeper
from layerzero_runtime.calls.interception import is_intercepted
from layerzero_runtime.operation import Operation
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tensors import call_key, gradients_needed

# Types of devices, as torch names them, that `detect_device` knows.
DESCRIBED_DEVICES = ("cpu", "cuda")


def serve(
    snapshot: Snapshot,
    operation: Operation,
    arguments: tuple[Any, ...],
    features: Mapping[str, Any],
    default_features: Mapping[str, Any] | None = None,
    keep: Keeper | None = None,
) -> Any:
    """Serve a call whose features have to be read one by one.

    Args:
        arguments: positional arguments of the operation's kernels.
        features: what `operation.describe` takes by keyword.
        default_features: fields that the default's loader needs beside `features`. The default takes intercepted calls,
            those on devices that cannot be described, and empty ones whose result does not follow from the shapes; what
            they lack, torch itself reports.
        keep: keeps the kind of the call, which its function will then serve by itself; not asked to where a call says
            more than its arguments do.

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
    call: Hashable = None
    if PUBLISHED.special:
        # Only here: what the public functions serve by themselves is eager calls alone.
        features, keep = {**features, "mode": current_mode()}, None
    else:
        # All that what serves the call can depend on.
        call = (operation.name, call_key(arguments), *features.items())
        try:
            served = snapshot.seen.whole.get(call)
        except TypeError:  # an argument is of a type that none can have
            call = served = None
        if served is not None:
            function, count_call, recover = served
            count_call()
            try:
                return function(*arguments)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, arguments)
    context = operation.describe(*arguments, **features)
    route = snapshot.route(operation, context, features)
    route.count_call()
    leaf = route.decide(*operation.sizes(context))
    try:
        result = route.functions[leaf](*arguments)
    except Exception as error:  # noqa: BLE001 - recover judges it
        return route.recover(error, arguments)
    if keep is not None and not context.requires_grad and not context.requires_deterministic:
        keep(snapshot.seen, route)
    elif call is not None:
        function, _ = route.settled(leaf, arguments)
        snapshot.seen.keep_whole(call, (function, route.count_call, route.recover))
    return result


def _why_undescribed(tensors: list[Tensor]) -> str | None:
    """The counter of calls like this one, which no context describes; None for the others."""
    if is_intercepted(*tensors):
        return "intercepted"
    if any(tensor.numel() == 0 for tensor in tensors):
        return "empty"
    if tensors and all(tensor.device.type not in DESCRIBED_DEVICES for tensor in tensors):
        return "other_devices"
    return None
