"""Scaled dot product attention: `attention.causal`, `attention.full`, `attention.cross`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import USUAL, Axis, Matrices, Operation, Sizes, TensorArgument
from layerzero_runtime.tensors import call_features, check_tensors, common_dtype, dtype_is_bool

if TYPE_CHECKING:
    from torch import Tensor


def _query_shape(context: SelectionContext) -> Sizes:
    return _laid_out(context, context.num_heads, context.seq_len_q, context.head_dim)


def _key_shape(context: SelectionContext) -> Sizes:
    return _laid_out(context, context.num_kv_heads, context.seq_len_k, context.head_dim)


def _value_shape(context: SelectionContext) -> Sizes:
    return _laid_out(context, context.num_kv_heads, context.seq_len_k, context.v_head_dim)


def _output_shapes(context: SelectionContext) -> tuple[Sizes, ...]:
    return (_laid_out(context, context.num_heads, context.seq_len_q, context.v_head_dim),)


def _laid_out(context: SelectionContext, heads: int | None, length: int | None, width: int | None) -> Sizes:
    assert context.batch_size and heads and length and width
    if context.layout == "bhsd":
        return (context.batch_size, heads, length, width)
    return (context.batch_size, length, heads, width)


def _arguments(context: SelectionContext, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors.get("attn_mask"),
        context.dropout_p,
        context.scale,
    )


def _shapes(query: Tensor, key: Tensor, value: Tensor, layout: str) -> dict[str, Any]:
    """The sizes of a call.

    Raises:
        ContextError: a tensor does not have four dimensions, or the shapes do not fit together.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ContextError(f"{name} has {tensor.dim()} dimensions, required 4 ({layout})")
    heads, length = (1, 2) if layout == "bhsd" else (2, 1)
    q, k, v = query.shape, key.shape, value.shape
    if not (q[0] == k[0] == v[0] and q[3] == k[3] and k[heads] == v[heads] and k[length] == v[length]):
        raise ContextError(
            f"shapes do not fit together in layout {layout}: query {tuple(q)}, key {tuple(k)}, value {tuple(v)}; "
            "required are equal batch sizes, equal head dimensions of query and key, "
            "and equal heads and lengths of key and value"
        )
    return {
        "batch_size": q[0],
        "num_heads": q[heads],
        "num_kv_heads": k[heads],
        "seq_len_q": q[length],
        "seq_len_k": k[length],
        "head_dim": q[3],
        "v_head_dim": v[3],
    }


def _describer(operation: str) -> Callable[..., SelectionContext]:
    def describe(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        *,
        layout: str = "bhsd",
        causal_alignment: str = "top_left",
        quant_format: str | None = None,
        mode: str = "eager",
    ) -> SelectionContext:
        tensors = {"query": query, "key": key, "value": value}
        all_tensors = tensors if attn_mask is None else {**tensors, "attn_mask": attn_mask}
        check_tensors(all_tensors)
        mask = "none" if attn_mask is None else "bool" if dtype_is_bool(attn_mask) else "float"
        return SelectionContext(
            operation=operation,
            dtype=common_dtype(tensors),
            mode=mode,
            **_shapes(query, key, value, layout),
            causal_alignment=causal_alignment,
            layout=layout,
            quant_format=quant_format,
            attn_mask=mask,
            dropout_p=dropout_p,
            scale=scale,
            **call_features(all_tensors),
        )

    return describe


def _flops(context: SelectionContext) -> int:
    """Two multiply-adds per score element and head dimension; a square causal mask leaves half of the elements."""
    assert context.score_elements and context.head_dim and context.v_head_dim
    whole = 2 * context.score_elements * (context.head_dim + context.v_head_dim)
    return whole // 2 if context.is_causal else whole


def reference(
    context: SelectionContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Attention written out: softmax(query key^T x scale + mask) value; rows without a key give zeros, as in torch."""
    import torch

    bshd = context.layout == "bshd"
    if bshd:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    length_q, length_k = query.shape[2], key.shape[2]
    factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * factor
    if context.is_causal:
        offset = length_k - length_q if context.causal_alignment == "bottom_right" else 0
        rows = torch.arange(length_q, device=query.device).unsqueeze(1)
        columns = torch.arange(length_k, device=query.device).unsqueeze(0)
        scores = scores.masked_fill(columns > rows + offset, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).masked_fill(largest == -math.inf, 0.0)
    output = torch.einsum("bhqk,bhkd->bhqd", weights, value)
    return (output.transpose(1, 2) if bshd else output,)


_TENSORS = (
    TensorArgument("query", _query_shape),
    TensorArgument("key", _key_shape),
    TensorArgument("value", _value_shape),
)
_PLAIN = {
    "layout": "bhsd",
    "attn_mask": "none",
    "dropout_p": 0.0,
    "scale": None,
    "other_v_head_dim": None,
    **USUAL,
}
_REQUIRED = ("batch_size", "seq_len_q", "seq_len_k", "num_heads", "num_kv_heads", "head_dim")


def _misfit(context: SelectionContext) -> str | None:
    lengths = f"seq_len_q {context.seq_len_q} and seq_len_k {context.seq_len_k}"
    if context.operation == "attention.full" and context.seq_len_q != context.seq_len_k:
        return f"attention.full has equal lengths, not {lengths}; unequal ones are attention.cross"
    if context.operation == "attention.cross" and context.seq_len_q == context.seq_len_k:
        return f"attention.cross has unequal lengths, not {lengths}; equal ones are attention.full"
    return None


def _declare(name: str, static: tuple[str, ...], axes: tuple[Axis, ...]) -> Operation:
    return Operation(
        name=name,
        required=_REQUIRED,
        static=("head_dim", "gqa_group", *static),
        plain=_PLAIN,
        fixed=("causal_mask", "scale_is_usual"),
        axes=axes,
        monotone=("seq_len_q", "seq_len_k", "score_elements", "batch_kv_heads"),
        tensors=_TENSORS,
        outputs=_output_shapes,
        arguments=_arguments,
        describe=_describer(name),
        default_kernel="torch.sdpa",
        flops=_flops,
        reference=reference,
        misfit=_misfit,
        matrices=_HEADS,
        graded="gqa_group",
    )


def _batch_fields(context: SelectionContext, size: int) -> dict[str, int]:
    return {"batch_size": size, "num_kv_heads": 1, "num_heads": context.gqa_group or 1}


def _equal_lengths(context: SelectionContext, size: int) -> dict[str, int]:
    return {"seq_len_q": size, "seq_len_k": size}


_BATCH = Axis("batch_kv_heads", fields=_batch_fields)
# The results of all heads, and the queries of each.
_HEADS = Matrices(count=0, rows=1, each=lambda context: context.gqa_group or 1)
CAUSAL = _declare(
    "attention.causal",
    ("causal_geometry",),
    (_BATCH, Axis("seq_len_q"), Axis("seq_len_k", tied=("causal_geometry", "square"))),
)
FULL = _declare("attention.full", (), (_BATCH, Axis("seq_len_q", fields=_equal_lengths)))
CROSS = _declare("attention.cross", (), (_BATCH, Axis("seq_len_q"), Axis("seq_len_k")))
OPERATIONS = (CAUSAL, FULL, CROSS)
