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
from layerzero_runtime.tables.table import MISS

# Sizes that stand for any: a static key does not hold them.
_ANY = {"attention": {"batch_size": 1, "seq_len_q": 2}, "norm": {"rows": 1}, "mlp": {"rows": 1}}


# The last call of a bound function, (seen, sizes, leaf, and the parts of its route): the leaf serves while its sizes
# repeat, and the parts while what was seen is that of the snapshot in force. Plain tuples, because each change of sizes
# makes one.
_Parts = tuple[Callable[..., int], list[KernelFunction], Callable[[], int], Callable[..., Any]]
_Last = tuple[object, object, int, *_Parts]
# What no snapshot has seen: after a call in graph mode the next one looks for its route again.
_NEVER = object()


class _Binding:
    """Static features, and the route that they have in the snapshot in force and the caller's mode."""

    def __init__(self, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> None:
        self.operation = operation
        self.features = dict(features)
        self._contexts = {mode: replace(context, mode=mode) for mode in MODES}
        self.nothing: _Last = (_NEVER, None, MISS, *self.parts()[1:])

    def parts(self) -> tuple[object, *_Parts]:
        """What was seen under the snapshot in force, and (decide, functions, count_call, recover) of the route."""
        mode, snapshot = current_mode(), current_snapshot()
        route = snapshot.route(self.operation, self._contexts[mode], {**self.features, "mode": mode})
        seen = snapshot.seen if mode == "eager" else _NEVER
        return seen, route.decide, route.functions, route.count_call, route.recover

    def serve(self, sizes: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[Any, _Last]:
        """The result of a call under another snapshot or mode than the last, and what serves the next one."""
        if not all(sizes):
            return serve(current_snapshot(), self.operation, arguments, self.features), self.nothing
        seen, decide, functions, count_call, recover = self.parts()
        leaf = decide(*sizes)
        count_call()
        try:
            result = functions[leaf](*arguments)
        except Exception as error:  # noqa: BLE001 - recover judges it
            result = recover(error, arguments)
        return result, (seen, None, leaf, decide, functions, count_call, recover)


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
    parts = binding.parts()

    def kernel(*sizes: int) -> KernelFunction:
        nonlocal parts
        if PUBLISHED.eager is not parts[0]:
            parts = binding.parts()
        return parts[2][parts[1](*sizes)]

    return kernel


# One function for each way of reading sizes and each number of arguments: to share their parts, or to pass arguments on
# as a list, costs as much as all the checks.
def _one_shape(binding: _Binding, kv_heads: int) -> Callable[..., Any]:
    last = binding.nothing
    is_full = len(binding.operation.axes) == 2

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal last
        seen, sizes, leaf, decide, functions, count_call, recover = last
        shape = query.shape
        if shape != sizes or PUBLISHED.eager is not seen:
            batch, _, length, _ = shape
            if not (batch and length) or PUBLISHED.eager is not seen:
                lengths = (length,) if is_full else (length, length)
                result, last = binding.serve((batch * kv_heads, *lengths), (query, key, value, None, 0.0, None))
                return result
            leaf = decide(batch * kv_heads, length) if is_full else decide(batch * kv_heads, length, length)
            last = (seen, shape, leaf, decide, functions, count_call, recover)
        count_call()
        try:
            return functions[leaf](query, key, value, None, 0.0, None)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (query, key, value, None, 0.0, None))

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _two_shapes(binding: _Binding, context: SelectionContext, kv_heads: int) -> Callable[..., Any]:
    # Of causal attention, calls whose lengths happen to be equal are of another static key.
    equal = binding
    if context.operation == "attention.causal":
        equal = _Binding(binding.operation, replace(context, seq_len_k=context.seq_len_q), binding.features)
    # The binding of the last call goes with what serves it.
    last = binding, binding.nothing

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal last
        chosen, (seen, sizes, leaf, decide, functions, count_call, recover) = last
        shapes = query.shape, key.shape
        if shapes != sizes or PUBLISHED.eager is not seen:
            batch, _, length_q, _ = shapes[0]
            length_k = shapes[1][2]
            wanted = equal if length_q == length_k else binding
            if wanted is not chosen or PUBLISHED.eager is not seen or not (batch and length_q and length_k):
                all_sizes = (batch * kv_heads, length_q, length_k)
                result, served = wanted.serve(all_sizes, (query, key, value, None, 0.0, None))
                last = wanted, served
                return result
            leaf = decide(batch * kv_heads, length_q, length_k)
            last = chosen, (seen, shapes, leaf, decide, functions, count_call, recover)
        count_call()
        try:
            return functions[leaf](query, key, value, None, 0.0, None)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (query, key, value, None, 0.0, None))

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _rows(x: Tensor, width: int | None) -> tuple[int, int]:
    """(rows, hidden_size) of a tensor with any number of leading dimensions; no rows without elements."""
    wide = x.shape[-1] if width is None else width
    return (x.numel() // wide if wide else 0), wide


def _rms(binding: _Binding, width: int | None, eps: float, offset: float) -> Callable[..., Any]:
    last = binding.nothing

    def bound(x: Tensor, weight: Tensor) -> Any:
        nonlocal last
        seen, sizes, leaf, decide, functions, count_call, recover = last
        key: Any = x.shape if width is None else x.numel()
        if key != sizes or PUBLISHED.eager is not seen:
            rows, wide = _rows(x, None) if width is None else (key // width, width)
            if not rows or PUBLISHED.eager is not seen:
                result, last = binding.serve((rows, wide), (x, weight, eps, offset))
                return result
            leaf = decide(rows, wide)
            last = (seen, key, leaf, decide, functions, count_call, recover)
        count_call()
        try:
            return functions[leaf](x, weight, eps, offset)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (x, weight, eps, offset))

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _gated(binding: _Binding, width: int | None) -> Callable[..., Any]:
    last = binding.nothing

    def bound(gate: Tensor, up: Tensor) -> Any:
        nonlocal last
        seen, sizes, leaf, decide, functions, count_call, recover = last
        key: Any = gate.shape if width is None else gate.numel()
        if key != sizes or PUBLISHED.eager is not seen:
            rows, wide = _rows(gate, None) if width is None else (key // width, width)
            if not rows or PUBLISHED.eager is not seen:
                result, last = binding.serve((rows, wide), (gate, up))
                return result
            leaf = decide(rows, wide)
            last = (seen, key, leaf, decide, functions, count_call, recover)
        count_call()
        try:
            return functions[leaf](gate, up)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (gate, up))

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _three(binding: _Binding, width: int | None, eps: float) -> Callable[..., Any]:
    last = binding.nothing

    def bound(x: Tensor, second: Tensor, third: Tensor) -> Any:
        nonlocal last
        seen, sizes, leaf, decide, functions, count_call, recover = last
        key: Any = x.shape if width is None else x.numel()
        if key != sizes or PUBLISHED.eager is not seen:
            rows, wide = _rows(x, None) if width is None else (key // width, width)
            if not rows or PUBLISHED.eager is not seen:
                result, last = binding.serve((rows, wide), (x, second, third, eps))
                return result
            leaf = decide(rows, wide)
            last = (seen, key, leaf, decide, functions, count_call, recover)
        count_call()
        try:
            return functions[leaf](x, second, third, eps)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (x, second, third, eps))

    bound.kernel = _kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound
