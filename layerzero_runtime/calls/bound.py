"""`bind`: an operation as a function for one set of static features, which looks at nothing but sizes per call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerzero_runtime.calls.serving import serve
from layerzero_runtime.context import FIELD_NAMES, MODES, SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import ContextError, ContextTypeError
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.operations.norm import LAYER_EPS, RMS_EPS
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.serving.seen_calls import SeenCalls

# Sizes that stand for any: a static key does not hold them.
_ANY = {"attention": {"batch_size": 1, "seq_len_q": 2}, "norm": {"rows": 1}, "mlp": {"rows": 1}}


# The last call of a bound function, (seen, sizes, function, count_call, recover): while what was seen is that of the
# snapshot in force and the sizes repeat, the function serves. A plain tuple, because each change of sizes makes one.
_Last = tuple[SeenCalls | None, object, KernelFunction, Callable[[], int], Callable[..., Any]]


def _unset(*arguments: Any) -> Any:
    raise AssertionError("no call came before this one")


_NONE: _Last = (None, None, _unset, int, _unset)


class _Binding:
    """Static features, and the route that they have in the snapshot in force and the caller's mode."""

    def __init__(self, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> None:
        self.operation = operation
        self.features = dict(features)
        self._contexts = {mode: replace(context, mode=mode) for mode in MODES}
        self._current: tuple[Route, SeenCalls] | None = None
        self.route()

    def route(self) -> tuple[Route, SeenCalls | None]:
        """The route, and what was seen under its snapshot: while that is in force, eager calls may take it again."""
        current = self._current
        if current is not None and PUBLISHED.eager is current[1]:
            return current
        mode, snapshot = current_mode(), current_snapshot()
        route = snapshot.route(self.operation, self._contexts[mode], {**self.features, "mode": mode})
        if mode != "eager":
            return route, None
        self._current = route, snapshot.seen
        return self._current

    def run(self, sizes: tuple[int, ...], arguments: tuple[Any, ...], key: object) -> tuple[Any, _Last]:
        """The result of a call, and what serves the next one of equal sizes."""
        route, seen = self.route()
        if not all(sizes):
            return serve(current_snapshot(), self.operation, arguments, self.features), _NONE
        leaf = route.decide(*sizes)
        route.count_call()
        try:
            result = route.functions[leaf](*arguments)
        except Exception as error:  # noqa: BLE001 - recover judges it
            result = route.recover(error, arguments)
        return result, (seen, key, route.functions[leaf], route.count_call, route.recover)


def bind(operation: str, *, device: str = "auto", equal_lengths: bool = False, **features: Any) -> Callable[..., Any]:
    """An operation for one set of static features. The function that it gives takes the operation's tensors:
    (query, key, value), (x, weight), (x, residual, weight), (x, weight, bias) or (gate, up).

    It trusts its caller: dtypes, devices, head counts, `hidden_size` and all else that was given here is a promise for
    every call, and so are plain tensors without gradients and autocast. What is looked at per call: the query's shape
    and, where the lengths may differ, the key's; the number of elements of rows whose `hidden_size` was given, else
    their shape. It follows policies, registrations, breakers and tables as they change.

    Args:
        operation: such as "norm.rms".
        device: of the tensors, as for `detect_device`.
        equal_lengths: of attention.causal: query and key are equally long in every call.
        features: fields of `SelectionContext` by name, such as dtype, num_heads, num_kv_heads, head_dim, hidden_size,
            and `eps` of norms.

    The function's attribute `kernel` takes the operation's bucketed sizes as integers and gives the kernel's function.

    Raises:
        ContextError: the operation is unknown, or a feature is missing or not allowed.
        ContextTypeError: a feature has the wrong type, or no context has it.
    """
    declared = operation_named(operation)
    family = operation.split(".")[0]
    eps = features.pop("eps", LAYER_EPS if operation == "norm.layer" else RMS_EPS)
    if equal_lengths and operation != "attention.causal":
        raise ContextError(
            f"equal_lengths is for attention.causal; {operation} says by itself whether lengths are equal"
        )
    if unknown := sorted(set(features) - set(FIELD_NAMES)):
        raise ContextTypeError(f"no context has {unknown[0]!r}; features are eps of norms and {', '.join(FIELD_NAMES)}")
    given = {**_ANY[family], **features}
    if family == "attention":
        # Lengths that differ, where they may: a context of square causal attention is another static key.
        given["seq_len_k"] = 2 if equal_lengths or operation == "attention.full" else 3
    else:
        given.setdefault("hidden_size", 1)
    if operation == "norm.layer":
        given.setdefault("has_bias", True)
    context = SelectionContext(operation=operation, **given).with_device(detect_device(device))
    declared.validate(context)
    described = ("layout", "causal_alignment") if family == "attention" else ("approximate",)
    named = described if operation.startswith("attention") or operation == "mlp.geglu" else ()
    binding = _Binding(declared, context, {name: getattr(context, name) for name in named})
    if family == "attention":
        if context.layout != "bhsd":
            raise ContextError(f"layout is {context.layout!r}; bound attention takes bhsd, transpose its views")
        kv_heads = context.num_kv_heads or 1
        return _one_shape(binding, kv_heads) if given["seq_len_k"] == 2 else _two_shapes(binding, context, kv_heads)
    width = features.get("hidden_size")
    if family == "mlp":
        return _gated(binding, width)
    return _rms(binding, width, eps, context.offset) if operation == "norm.rms" else _three(binding, width, eps)


def _kernel_by_sizes(binding: _Binding) -> Callable[..., KernelFunction]:
    last: tuple[SeenCalls | None, Callable[..., int], list[KernelFunction]] = (None, int, [])

    def kernel(*sizes: int) -> KernelFunction:
        nonlocal last
        seen, decide, functions = last
        if seen is None or PUBLISHED.eager is not seen:
            route, seen = binding.route()
            last = _, decide, functions = seen, route.decide, route.functions
        return functions[decide(*sizes)]

    return kernel


def _one_shape(binding: _Binding, kv_heads: int) -> Callable[..., Any]:
    last = _NONE

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal last
        shape = query.shape
        seen, sizes, function, count_call, recover = last
        if shape == sizes and PUBLISHED.eager is seen:
            count_call()
            try:
                return function(query, key, value, None, 0.0, None)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (query, key, value, None, 0.0, None))
        arguments = (query, key, value, None, 0.0, None)
        lengths = (shape[2],) * (len(binding.operation.axes) - 1)
        result, last = binding.run((shape[0] * kv_heads, *lengths), arguments, shape)
        return result

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _two_shapes(binding: _Binding, context: SelectionContext, kv_heads: int) -> Callable[..., Any]:
    last = _NONE
    # Of causal attention, calls whose lengths happen to be equal are of another static key.
    square = None
    if context.operation == "attention.causal":
        square = _Binding(binding.operation, replace(context, seq_len_k=context.seq_len_q), binding.features)

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal last
        shapes = (query.shape, key.shape)
        seen, sizes, function, count_call, recover = last
        if shapes == sizes and PUBLISHED.eager is seen:
            count_call()
            try:
                return function(query, key, value, None, 0.0, None)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (query, key, value, None, 0.0, None))
        batch, _, length_q, _ = shapes[0]
        length_k = shapes[1][2]
        chosen = square if square is not None and length_q == length_k else binding
        arguments = (query, key, value, None, 0.0, None)
        result, last = chosen.run((batch * kv_heads, length_q, length_k), arguments, shapes)
        return result

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _rows_of(first: Tensor, width: int | None) -> tuple[int, int]:
    """(rows, hidden_size), zeros for a tensor without elements."""
    wide = first.shape[-1] if width is None else width
    return (first.numel() // wide if wide else 0), wide


# One function for each number of arguments: passing them on as a list costs as much as all the checks.
def _rms(binding: _Binding, width: int | None, eps: float, offset: float) -> Callable[..., Any]:
    last = _NONE

    def bound(x: Tensor, weight: Tensor) -> Any:
        nonlocal last
        key = x.shape if width is None else x.numel()
        seen, sizes, function, count_call, recover = last
        if key == sizes and PUBLISHED.eager is seen:
            count_call()
            try:
                return function(x, weight, eps, offset)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (x, weight, eps, offset))
        result, last = binding.run(_rows_of(x, width), (x, weight, eps, offset), key)
        return result

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _gated(binding: _Binding, width: int | None) -> Callable[..., Any]:
    last = _NONE

    def bound(gate: Tensor, up: Tensor) -> Any:
        nonlocal last
        key = gate.shape if width is None else gate.numel()
        seen, sizes, function, count_call, recover = last
        if key == sizes and PUBLISHED.eager is seen:
            count_call()
            try:
                return function(gate, up)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (gate, up))
        result, last = binding.run(_rows_of(gate, width), (gate, up), key)
        return result

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _three(binding: _Binding, width: int | None, eps: float) -> Callable[..., Any]:
    last = _NONE

    def bound(x: Tensor, second: Tensor, third: Tensor) -> Any:
        nonlocal last
        key = x.shape if width is None else x.numel()
        seen, sizes, function, count_call, recover = last
        if key == sizes and PUBLISHED.eager is seen:
            count_call()
            try:
                return function(x, second, third, eps)
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (x, second, third, eps))
        result, last = binding.run(_rows_of(x, width), (x, second, third, eps), key)
        return result

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound
