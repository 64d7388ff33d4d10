"""`attention`: scaled dot product attention on dense tensors."""

from __future__ import annotations

from torch import Tensor

from layerzero_runtime.calls.interception import is_plain
from layerzero_runtime.calls.serving import serve
from layerzero_runtime.context import ALIGNMENTS, DENSE_LAYOUTS
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations.attention import CAUSAL, CROSS, FULL
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

    Returns:
        A tensor in the layout of the query, with v_head_dim as its last dimension.

    Raises:
        ContextError: an argument is not allowed, or the tensors do not fit together.
        ContextTypeError: query, key, value or attn_mask is no tensor.
        NoKernelAvailableError: no kernel accepts the call.
    """
    snapshot = current_snapshot()
    route_key = None
    if (
        attn_mask is None
        and scale is None
        and dropout_p == 0.0
        and layout == "bhsd"
        and is_plain(query, key, value)
        and query.dim() == key.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    ):
        batch, heads, length_q, head_dim = query.shape
        batch_k, kv_heads, length_k, head_dim_k = key.shape
        if (
            batch == batch_k
            and head_dim == head_dim_k
            and length_k
            and kv_heads
            and (enable_gqa or heads == kv_heads)
            and key.shape == value.shape
        ):
            operation = CAUSAL if is_causal else FULL if length_q == length_k else CROSS
            square = length_q == length_k
            route_key = (
                operation.name,
                query.dtype,
                query.device,
                head_dim,
                heads / kv_heads,
                square,
                causal_alignment,
            )
            route = snapshot.fast_routes.get(route_key)
            if route is not None and batch and length_q:
                route.calls.raise_by_one()
                sizes = (batch * kv_heads, length_q) if operation is FULL else (batch * kv_heads, length_q, length_k)
                try:
                    output: Tensor = route.functions[route.decide(*sizes)](query, key, value, None, 0.0, None)
                except Exception as error:  # noqa: BLE001 - recover judges it
                    output = route.recover(error, (query, key, value, None, 0.0, None))
                return output
    length, heads_at = _layout_dimensions(layout)
    check_tensors({"query": query, "key": key, "value": value})
    operation = _operation(query, key, is_causal, enable_gqa, length, heads_at)
    features = {"layout": layout, "causal_alignment": _checked_alignment(causal_alignment)}
    # A loader asks only whether lengths and heads are equal: 1 and 2 stand for any that differ.
    sizes_alike = {
        "seq_len_q": 1,
        "seq_len_k": 1 if query.shape[length] == key.shape[length] else 2,
        "num_kv_heads": 1,
        "num_heads": 1 if query.shape[heads_at] == key.shape[heads_at] else 2,
    }
    arguments = (query, key, value, attn_mask, dropout_p, scale)
    result: Tensor = serve(snapshot, operation, arguments, features, route_key, sizes_alike)
    return result


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
