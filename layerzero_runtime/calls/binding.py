"""A binding: static features, and what serves their calls while the snapshot stays in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from layerzero_runtime.calls.serving import serve
from layerzero_runtime.context import MODES, SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED

# Sizes whose leaf a bound function keeps; beyond, it begins anew.
MAX_SIZES = 1024
# What serves the calls of a bound function while what was seen is that of the snapshot in force: (seen, what was
# decided by sizes, then decide, functions, count_call, recover of the route). One tuple, so that threads see parts that
# fit together.
Serving = tuple[object, dict[Any, Any], Callable[..., int], list[KernelFunction], Callable[[], int], Callable[..., Any]]
# What no snapshot has seen: after a call in graph mode the next one looks for its route again.
_NEVER = object()


class Binding:
    """Static features, and the route that they have in the snapshot in force and the caller's mode."""

    def __init__(self, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> None:
        self.operation = operation
        self.features = dict(features)
        self._contexts = {mode: replace(context, mode=mode) for mode in MODES}

    def serving(self) -> Serving:
        """What serves under the snapshot and in the mode of here and now."""
        mode, snapshot = current_mode(), current_snapshot()
        route = snapshot.route(self.operation, self._contexts[mode], {**self.features, "mode": mode})
        seen = snapshot.seen if mode == "eager" else _NEVER
        return seen, {}, route.decide, route.functions, route.count_call, route.recover

    def serve_empty(self, arguments: tuple[Any, ...]) -> Any:
        return serve(current_snapshot(), self.operation, arguments, self.features)


def keep_decided(decided: dict[Any, Any], sizes: Any, leaf: Any) -> None:
    """Keep what was decided by sizes, of at most `MAX_SIZES`."""
    if len(decided) >= MAX_SIZES:
        decided.clear()
    decided[sizes] = leaf


def kernel_by_sizes(binding: Binding) -> Callable[..., KernelFunction]:
    """A function from the operation's bucketed sizes to the kernel's function that serves them."""
    serving = binding.serving()

    def kernel(*sizes: int) -> KernelFunction:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, _, decide, functions, _, _ = serving
        return functions[decide(*sizes)]

    return kernel
