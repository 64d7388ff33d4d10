"""Calls inside `torch.compile`: a kernel is chosen while Dynamo traces, and the graph holds nothing but its call.

Dynamo traces `serve_traced`. What that does at trace time it does out of Dynamo's sight (`comptime`), on the fake
tensors of the call, in plain Python: describe, choose, prepare. Sizes that Dynamo keeps symbolic stay so: what is
compared of them becomes a guard, so that a graph serves the calls that get its kernel, and no others. What was found is
read back as an attribute of `IN_FORCE`, which is there for as long as the answer holds: a snapshot that selects
otherwise takes it away, and Dynamo compiles anew.

The mode ("eager" or "graph") is that of the trace. Nothing is counted per call, verified or retried in a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._dynamo.comptime import comptime
from torch.compiler import assume_constant_result, is_dynamo_compiling
from torch.fx import Proxy

from layerzero_runtime.calls.attention import described
from layerzero_runtime.calls.interception import PLAIN_TYPES, autocast, function_mode, transforms
from layerzero_runtime.calls.serving import DESCRIBED_DEVICES, serve
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.integrations.in_force import IN_FORCE, Answer, name_of, refusal
from layerzero_runtime.integrations.traced_candidates import concrete_candidate, key_plan
from layerzero_runtime.integrations.traced_kernels import traced_default, traced_function
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import Snapshot

if TYPE_CHECKING:
    from torch._dynamo.comptime import ComptimeContext

# What `_select` found, for `_found` to give to the code that is being traced.
_selected = threading.local()
# Dynamo, which would take it for a part of the model, leaves alone what serves eager calls between two graphs.
set_code_exec_strategy(serve.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def serve_traced(operation: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Serve a call that is being traced by Dynamo.

    Args:
        operation: its name; "attention" for the one that the tensors decide.
        arguments: positional arguments of the operation's kernels.
        options: what `operation.describe` takes by keyword; of "attention" what `calls.attention.described` takes.
    """
    return _serve(operation, arguments, options, tuple(map(type, arguments)), function_mode())


def _serve(
    operation: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    types: tuple[type, ...],
    has_function_mode: bool,
) -> Any:
    if not is_dynamo_compiling():
        # Behind a graph break: Dynamo could not trace the kernel, or the call is refused.
        described_call = _described(operation, arguments, options)
        return serve(current_snapshot(), described_call[0], arguments, *described_call[1:])
    # Reads the names of this function.
    comptime(_select)
    name, numbers = _found()
    known = [argument if number is None else number for argument, number in zip(arguments, numbers, strict=True)]
    return getattr(IN_FORCE, name)(*known)


@assume_constant_result  # type: ignore[untyped-decorator]
def _found() -> tuple[str, tuple[float | None, ...]]:
    """The name of what serves the call, and its arguments that are numbers."""
    found: tuple[str, tuple[float | None, ...]] = _selected.found
    return found


def _select(trace: ComptimeContext) -> None:
    """Choose for the call that `_serve` is in, at trace time."""

    def local(name: str) -> Any:
        return trace.get_local(name).as_proxy()

    arguments = tuple(map(_known, local("arguments")))
    call = _TracedCall(
        operation=local("operation"),
        arguments=arguments,
        options={name: _known(value) for name, value in local("options").items()},
        types=trace.get_local("types").as_python_constant(),
        has_function_mode=local("has_function_mode"),
    )
    try:
        name = call.select()
    except LayerZeroError as error:
        name = refusal(error)
    _selected.found = name, tuple(value if isinstance(value, float) else None for value in arguments)


def _described(
    operation: str, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Operation, Mapping[str, Any], Mapping[str, Any]]:
    """(the operation, what its `describe` takes by keyword, what the default's loader asks for beside it) of a call.

    Raises:
        ContextError: an argument is not allowed.
    """
    if operation == "attention":
        return described(*arguments[:3], **options)
    return OPERATIONS[operation], options, {"offset": arguments[3]} if operation == "norm.rms" else {}


def _known(value: Any) -> Any:
    """What is known of a value while tracing: the fake tensor of a tensor; a number, which is a constant of the graph.

    A number would otherwise become an input of the graph where sizes are dynamic.
    """
    known = value.node.meta["example_value"] if isinstance(value, Proxy) else value
    return float(known) if isinstance(known, torch.SymFloat) and known.node.hint is not None else known


@dataclass(frozen=True, kw_only=True)
class _TracedCall:
    """A call on fake tensors. `types` are those of the arguments as Python sees them."""

    operation: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    types: tuple[type, ...]
    has_function_mode: bool

    def select(self) -> str:
        """The name in `IN_FORCE` of the function that serves the call.

        Raises:
            ContextError: the arguments do not fit together.
            NoKernelAvailableError: no registered kernel accepts the call.
        """
        operation, features, default_features = _described(self.operation, self.arguments, self.options)
        # Again where another thread has published in between.
        while True:
            snapshot = current_snapshot()
            undescribed = self._why_undescribed()
            if undescribed is not None:
                answer = traced_default(snapshot, operation, {**features, **default_features})
            else:
                answer = self._answer(snapshot, operation, features)
            name = name_of(answer, snapshot)
            if name is not None:
                snapshot.counters.raise_by_one("traced")
                if undescribed is not None:
                    snapshot.counters.raise_by_one(undescribed)
                return name

    def _why_undescribed(self) -> str | None:
        """The counter of calls like this one, which no context describes; None for the others."""
        tensors = [argument for argument in self.arguments if isinstance(argument, torch.Tensor)]
        types = [
            kind for kind, value in zip(self.types, self.arguments, strict=True) if isinstance(value, torch.Tensor)
        ]
        if (
            not PLAIN_TYPES.issuperset(types)
            or self.has_function_mode
            or transforms() is not None
            or autocast()
            or forward_mode._current_level >= 0
        ):
            return "intercepted"
        if any(_is_unknown(number) for tensor in tensors for number in (*tensor.shape, *tensor.stride())):
            return "unknown_sizes"
        if any(size == 0 for tensor in tensors for size in tensor.shape):
            return "empty"
        if all(tensor.device.type not in DESCRIBED_DEVICES for tensor in tensors):
            return "other_devices"
        return None

    def _answer(self, snapshot: Snapshot, operation: Operation, features: Mapping[str, Any]) -> Answer:
        if PUBLISHED.special:
            features = {**features, "mode": current_mode()}
        context = operation.describe(*self.arguments, **features)
        sizes = _symbolic_sizes(context)
        example = _with_sizes(context, {name: size.node.hint for name, size in sizes.items()})
        if sizes:
            # Static features hold for every call of the graph: each comparison with a symbolic one is a guard.
            if operation.static_key(context) != operation.static_key(example):
                raise AssertionError(f"static features of {context} changed while it was traced")
            plan = key_plan(snapshot, operation, example)
            candidate = plan.choose(operation, context, example)
            if candidate is not None:
                choice = candidate.served(snapshot, operation, example)
                function = traced_function(snapshot, choice, operation, example, features, self.arguments)
                return Answer(function, choice, plan, lambda later: key_plan(later, operation, example))
            # Nothing serves these whatever their sizes: the graph is for the sizes of this call alone.
            example = _with_sizes(context, {name: int(size) for name, size in sizes.items()})
        return self._concrete_answer(snapshot, operation, example, features)

    def _concrete_answer(
        self, snapshot: Snapshot, operation: Operation, context: SelectionContext, features: Mapping[str, Any]
    ) -> Answer:
        candidate = concrete_candidate(snapshot, operation, context)
        choice = candidate.served(snapshot, operation, context)
        function = traced_function(snapshot, choice, operation, context, features, self.arguments)
        return Answer(function, choice, candidate, lambda later: concrete_candidate(later, operation, context))


def _is_unknown(size: int | torch.SymInt) -> bool:
    """Whether a size follows from data, so that no comparison of it can be decided while tracing."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def _symbolic_sizes(context: SelectionContext) -> dict[str, torch.SymInt]:
    values = ((field.name, getattr(context, field.name)) for field in fields(context))
    return {name: value for name, value in values if isinstance(value, torch.SymInt)}


def _with_sizes(context: SelectionContext, sizes: Mapping[str, Any]) -> SelectionContext:
    return replace(context, **sizes)
