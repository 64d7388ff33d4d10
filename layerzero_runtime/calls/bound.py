"""`bind`: an operation as a function for one set of static features, which looks at nothing but sizes per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerzero_runtime.calls.binding import Binding, keep_decided, kernel_by_sizes
from layerzero_runtime.context import FIELD_NAMES, SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import ContextError, ContextTypeError
from layerzero_runtime.operations import operation_named
from layerzero_runtime.operations.norm import LAYER_EPS, RMS_EPS
from layerzero_runtime.serving.published import PUBLISHED

# Sizes that stand for any: a static key does not hold them.
_ANY = {
    "attention": {"batch_size": 1, "seq_len_q": 2},
    "norm": {"rows": 1, "hidden_size": 1},
    "mlp": {"rows": 1, "hidden_size": 1},
    "linear": {"rows": 1, "in_features": 1, "out_features": 1},
}


def bind(operation: str, *, device: str = "auto", equal_lengths: bool = False, **features: Any) -> Callable[..., Any]:
    """An operation for one set of static features. The function that it gives takes the operation's tensors:
    (query, key, value), (x, weight), (x, residual, weight), (x, weight, bias), (gate, up) or (x, weight, scale_x,
    scale_w) and, where `has_bias` was given, bias.

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
    if operation == "norm.layer":
        given.setdefault("has_bias", True)
    context = SelectionContext(operation=operation, **given).with_device(detect_device(device))
    declared.validate(context)
    described = ("layout", "causal_alignment") if family == "attention" else ("approximate",)
    named = described if operation.startswith("attention") or operation == "mlp.geglu" else ()
    binding = Binding(declared, context, {name: getattr(context, name) for name in named})
    if family == "attention":
        if context.layout != "bhsd":
            raise ContextError(f"layout is {context.layout!r}; bound attention takes bhsd, transpose its views")
        kv_heads = context.num_kv_heads or 1
        if given["seq_len_k"] == 2:
            return _one_shape(binding, kv_heads)
        equal = binding
        if operation == "attention.causal":
            # Calls whose lengths happen to be equal are of another static key.
            equal = Binding(declared, replace(context, seq_len_k=context.seq_len_q), binding.features)
        return _two_shapes(binding, equal, kv_heads)
    width = features.get("hidden_size")
    if family == "mlp":
        return _gated(binding, width)
    if family == "linear":
        return _linear(binding)
    return _rms(binding, width, eps, context.offset) if operation == "norm.rms" else _three(binding, width, eps)


# One function for each way of reading sizes and each number of arguments: to share their parts, or to pass arguments on
# as a list, costs as much as all the checks.
def _one_shape(binding: Binding, kv_heads: int) -> Callable[..., Any]:
    serving = binding.serving()
    further_axes = len(binding.operation.axes) - 1

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, leaves, decide, functions, count_call, recover = serving
        sizes = query.shape
        leaf = leaves.get(sizes)
        if leaf is None:
            batch, _, length, _ = sizes
            if not (batch and length):
                return binding.serve_empty((query, key, value, None, 0.0, None))
            lengths = (length,) * further_axes
            leaf = decide(batch * kv_heads, *lengths)
            keep_decided(leaves, sizes, leaf)
        count_call()
        try:
            return functions[leaf](query, key, value, None, 0.0, None)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (query, key, value, None, 0.0, None))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _two_shapes(binding: Binding, equal: Binding, kv_heads: int) -> Callable[..., Any]:
    """`equal` is the binding of calls whose lengths are equal."""
    serving = binding.serving()

    def bound(query: Tensor, key: Tensor, value: Tensor) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        leaves = serving[1]
        sizes = (query.shape, key.shape)
        found = leaves.get(sizes)
        if found is None:
            (batch, _, length_q, _), (_, _, length_k, _) = sizes
            if not (batch and length_q and length_k):
                return binding.serve_empty((query, key, value, None, 0.0, None))
            route = equal.serving() if length_q == length_k else serving
            _, _, decide, functions, count_call, recover = route
            found = (functions, decide(batch * kv_heads, length_q, length_k), count_call, recover)
            keep_decided(leaves, sizes, found)
        functions, leaf, count_call, recover = found
        count_call()
        try:
            return functions[leaf](query, key, value, None, 0.0, None)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (query, key, value, None, 0.0, None))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _rows(x: Tensor, width: int | None) -> tuple[int, int]:
    """(rows, hidden_size) of a tensor with any number of leading dimensions; no rows without elements."""
    wide = x.shape[-1] if width is None else width
    return (x.numel() // wide if wide else 0), wide


def _rms(binding: Binding, width: int | None, eps: float, offset: float) -> Callable[..., Any]:
    serving = binding.serving()

    def bound(x: Tensor, weight: Tensor) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, leaves, decide, functions, count_call, recover = serving
        sizes: Any = x.shape if width is None else x.numel()
        leaf = leaves.get(sizes)
        if leaf is None:
            rows, wide = _rows(x, width)
            if not rows:
                return binding.serve_empty((x, weight, eps, offset))
            leaf = decide(rows, wide)
            keep_decided(leaves, sizes, leaf)
        count_call()
        try:
            return functions[leaf](x, weight, eps, offset)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (x, weight, eps, offset))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _gated(binding: Binding, width: int | None) -> Callable[..., Any]:
    serving = binding.serving()

    def bound(gate: Tensor, up: Tensor) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, leaves, decide, functions, count_call, recover = serving
        sizes: Any = gate.shape if width is None else gate.numel()
        leaf = leaves.get(sizes)
        if leaf is None:
            rows, wide = _rows(gate, width)
            if not rows:
                return binding.serve_empty((gate, up))
            leaf = decide(rows, wide)
            keep_decided(leaves, sizes, leaf)
        count_call()
        try:
            return functions[leaf](gate, up)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (gate, up))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _linear(binding: Binding) -> Callable[..., Any]:
    serving = binding.serving()

    def bound(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None = None) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, leaves, decide, functions, count_call, recover = serving
        sizes = (x.shape, weight.shape)
        leaf = leaves.get(sizes)
        if leaf is None:
            rows, wide = _rows(x, None)
            if not (rows and weight.shape[0]):
                return binding.serve_empty((x, weight, scale_x, scale_w, bias))
            leaf = decide(rows, wide, weight.shape[0])
            keep_decided(leaves, sizes, leaf)
        count_call()
        try:
            return functions[leaf](x, weight, scale_x, scale_w, bias)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (x, weight, scale_x, scale_w, bias))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound


def _three(binding: Binding, width: int | None, eps: float) -> Callable[..., Any]:
    serving = binding.serving()

    def bound(x: Tensor, second: Tensor, third: Tensor) -> Any:
        nonlocal serving
        if PUBLISHED.eager is not serving[0]:
            serving = binding.serving()
        _, leaves, decide, functions, count_call, recover = serving
        sizes: Any = x.shape if width is None else x.numel()
        leaf = leaves.get(sizes)
        if leaf is None:
            rows, wide = _rows(x, width)
            if not rows:
                return binding.serve_empty((x, second, third, eps))
            leaf = decide(rows, wide)
            keep_decided(leaves, sizes, leaf)
        count_call()
        try:
            return functions[leaf](x, second, third, eps)
        except Exception as error:  # noqa: BLE001 - recover judges it
            return recover(error, (x, second, third, eps))

    bound.kernel = kernel_by_sizes(binding)  # type: ignore[attr-defined]
    return bound
