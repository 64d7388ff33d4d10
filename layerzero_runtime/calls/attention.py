"""`attention`: scaled dot product attention on dense tensors."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from layerzero_runtime.calls.guards import Keeper, tensor_guard
from layerzero_runtime.calls.interception import deterministic, function_mode
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.context import ALIGNMENTS, DENSE_LAYOUTS, is_usual_scale
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import ContextError
from layerzero_runtime.integrations import traced
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations.attention import CAUSAL, CROSS, FULL
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.serving.seen_calls import REPEATS, SeenCalls
from layerzero_runtime.tensors import check_tensors


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bhsd",
    causal_alignment: str = "top_left",
    quant_format: str | None = None,
) -> Tensor:
    """Scaled dot product attention with the arguments of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (batch, num_heads, seq_len_q, head_dim) in layout "bhsd"; in "bshd" with heads and length swapped.
        key: (batch, num_kv_heads, seq_len_k, head_dim), likewise.
        value: (batch, num_kv_heads, seq_len_k, v_head_dim), likewise.
        attn_mask: boolean (True takes part) or added to the scores, which are (batch, num_heads, seq_len_q, seq_len_k).
        dropout_p: probability of dropping a weight.
        is_causal: mask keys that lie behind the query; excludes attn_mask.
        scale: factor of the scores, 1/sqrt(head_dim) if None.
        enable_gqa: allow fewer key/value heads than query heads.
        layout: "bhsd" or "bshd".
        causal_alignment: where a causal mask lies when the lengths differ: "top_left" as in torch, "bottom_right" as in
            flash-attn (chunked prefill).
        quant_format: "int8" or "fp8" for kernels that compute attention in that form; None for exact ones only.

    Returns:
        A tensor in the layout of the query, with v_head_dim as its last dimension.

    Raises:
        ContextError: an argument is not allowed, or the tensors do not fit together.
        ContextTypeError: query, key, value or attn_mask is no tensor.
        NoKernelAvailableError: no kernel accepts the call.
    """
    if is_dynamo_compiling():
        options = {
            "is_causal": is_causal,
            "enable_gqa": enable_gqa,
            "layout": layout,
            "causal_alignment": causal_alignment,
            "quant_format": quant_format,
        }
        return traced("attention", (query, key, value, attn_mask, dropout_p, scale), options)  # type: ignore[no-any-return]
    seen = PUBLISHED.eager
    if (
        seen is not None
        and attn_mask is None
        and dropout_p == 0.0
        and layout == "bhsd"
        and quant_format is None
        and not (function_mode() or deterministic())
        and forward_mode._current_level < 0
    ):
        guard, causal, alignment, grouped, usual_scale, function, count_call, recover = seen.last_attention
        if (
            guard(query, key, value)
            and is_causal is causal
            and causal_alignment == alignment
            and enable_gqa >= grouped
            and (scale is None or scale == usual_scale)
        ):
            count_call()
            try:
                return function(query, key, value, None, 0.0, scale)  # type: ignore[no-any-return]
            except Exception as error:  # noqa: BLE001 - recover judges it
                return recover(error, (query, key, value, None, 0.0, scale))  # type: ignore[no-any-return]
        for guard, causal, alignment, grouped, usual_scale, square, kv_heads, route in seen.attention:
            if (
                is_causal is causal
                and causal_alignment == alignment
                and enable_gqa >= grouped
                and (scale is None or scale == usual_scale)
                and guard(query, key, value)
            ):
                key_shape = key.shape
                batch, _, length_q, _ = query.shape
                batch_k, _, length_k, _ = key_shape
                if (length_q == length_k) is not square:
                    continue
                if key_shape != value.shape or batch != batch_k or not (batch and length_q and length_k):
                    break
                if square and not causal:
                    leaf = route.decide(batch * kv_heads, length_q)
                else:
                    leaf = route.decide(batch * kv_heads, length_q, length_k)
                route.count_call()
                try:
                    output: Tensor = route.functions[leaf](query, key, value, None, 0.0, scale)
                except Exception as error:  # noqa: BLE001 - recover judges it
                    return route.recover(error, (query, key, value, None, 0.0, scale))  # type: ignore[no-any-return]
                if key_shape != seen.key_shape:
                    seen.key_shape, seen.repeats = key_shape, 0
                elif seen.repeats < REPEATS:
                    seen.repeats += 1
                else:
                    # The layers of a model repeat each other's shapes.
                    function, by_strides = route.settled(leaf, (query, key, value, None, 0.0, scale))
                    sizes: list[list[int | None]] = [list(query.shape), list(key_shape), list(key_shape)]
                    guard = tensor_guard((query, key, value), sizes, same_strides=by_strides)
                    served = (function, route.count_call, route.recover)
                    seen.last_attention, seen.repeats = (guard, causal, alignment, grouped, usual_scale, *served), 0
                return output
    operation, features, sizes_alike = described(
        query, key, value, is_causal, enable_gqa, layout, causal_alignment, quant_format
    )
    arguments = (query, key, value, attn_mask, dropout_p, scale)
    is_plain = attn_mask is None and dropout_p == 0.0 and layout == "bhsd" and quant_format is None
    keep = _keeper(query, key, value, is_causal, causal_alignment, scale) if is_plain else None
    result: Tensor = serve(current_snapshot(), operation, arguments, features, sizes_alike, keep)
    return result


def described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
    layout: str,
    causal_alignment: str,
    quant_format: str | None,
) -> tuple[Operation, dict[str, Any], dict[str, Any]]:
    """(the operation, what its `describe` takes by keyword, what the default's loader asks for beside it) of a call.

    Raises:
        ContextError: an argument is not allowed, or heads differ without `enable_gqa`.
        ContextTypeError: query, key or value is no tensor.
    """
    length, heads_at = _layout_dimensions(layout)
    check_tensors({"query": query, "key": key, "value": value})
    operation = _operation(query, key, is_causal, enable_gqa, length, heads_at)
    features: dict[str, Any] = {"layout": layout, "causal_alignment": _checked_alignment(causal_alignment)}
    if quant_format is not None:
        features["quant_format"] = quant_format
    # A loader asks only whether lengths and heads are equal: 1 and 2 stand for any that differ.
    sizes_alike = {
        "seq_len_q": 1,
        "seq_len_k": 1 if query.shape[length] == key.shape[length] else 2,
        "num_kv_heads": 1,
        "num_heads": 1 if query.shape[heads_at] == key.shape[heads_at] else 2,
    }
    return operation, features, sizes_alike


def _keeper(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, alignment: str, scale: float | None
) -> Keeper | None:
    """What keeps the kind of a call in layout "bhsd"; None where the call has what no kind holds.

    Batch size and lengths may differ, but not whether the lengths are equal. A kind is (guard, is_causal,
    causal_alignment, whether heads are grouped, scale, whether lengths are equal, kv heads, route).
    """
    head_dim = query.shape[3]
    if key.shape != value.shape or not (scale is None or is_usual_scale(scale, head_dim)):
        return None

    def keep(seen: SeenCalls, route: Route) -> None:
        heads, kv_heads = query.shape[1], key.shape[1]
        guard = tensor_guard(
            (query, key, value), [[None, heads, None, head_dim], *[[None, kv_heads, None, head_dim]] * 2]
        )
        # There are several floats next to 1/sqrt(head_dim).
        usual_scale = head_dim**-0.5 if scale is None else scale
        is_square = query.shape[2] == key.shape[2]
        seen.keep(
            "attention", (guard, is_causal, alignment, heads != kv_heads, usual_scale, is_square, kv_heads, route)
        )

    return keep


def _layout_dimensions(layout: str) -> tuple[int, int]:
    """(dimension of the length, dimension of the heads)."""
    if layout not in DENSE_LAYOUTS:
        raise ContextError(f"layout is {layout!r}, allowed: {', '.join(DENSE_LAYOUTS)}")
    return (2, 1) if layout == "bhsd" else (1, 2)


def _checked_alignment(causal_alignment: str) -> str:
    if causal_alignment not in ALIGNMENTS:
        raise ContextError(f"causal_alignment is {causal_alignment!r}, allowed: {', '.join(ALIGNMENTS)}")
    return causal_alignment


def _operation(query: Tensor, key: Tensor, is_causal: bool, enable_gqa: bool, length: int, heads: int) -> Operation:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ContextError(f"{name} has {tensor.dim()} dimensions, required 4")
    if query.shape[heads] != key.shape[heads] and not enable_gqa:
        raise ContextError(
            f"query has {query.shape[heads]} heads and key {key.shape[heads]}; pass enable_gqa=True for grouped queries"
        )
    if is_causal:
        return CAUSAL
    return FULL if query.shape[length] == key.shape[length] else CROSS
