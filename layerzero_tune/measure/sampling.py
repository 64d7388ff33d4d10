"""The part of a call on which its result is checked, so that checking a long shape costs little."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation

if TYPE_CHECKING:
    from torch import Tensor

# Values of the result (rows x width), or of the score matrix (heads x queries x keys), that are evaluated in float64:
# about 5 ms on two cores.
SAMPLED_VALUES = 1 << 18
# Keys and values are copied to float64 whole for each head sampled: at most this many elements of each. So are the rows
# of a linear layer's weight.
SAMPLED_KEY_VALUES = 1 << 20
MAX_HEADS = 8
MIN_HEADS = 2
MIN_ROWS = 4


@dataclass(frozen=True)
class Sample:
    """A smaller call whose result is a part of the whole call's.

    Attributes:
        context: describes the smaller call.
        tensors: its tensors, in the dtype of the whole call.
        pick: from an output of the whole call to the part that is the smaller call's output.
    """

    context: SelectionContext
    tensors: Mapping[str, Tensor]
    pick: Callable[[Tensor], Tensor]


def draw_sample(
    operation: Operation, context: SelectionContext, tensors: Mapping[str, Tensor], chance: random.Random
) -> Sample:
    """A random sample of the call on `tensors`: rows of a norm or activation, rows and output channels of a linear
    layer, heads and query rows of attention."""
    if context.num_heads is not None:
        return _attention_sample(context, tensors, chance)
    if context.out_features is not None:
        return _linear_sample(operation, context, tensors, chance)
    return _row_sample(operation, context, tensors, chance)


def _row_sample(
    operation: Operation, context: SelectionContext, tensors: Mapping[str, Tensor], chance: random.Random
) -> Sample:
    rows = _places(_size(context.rows), SAMPLED_VALUES // _size(context.hidden_size), chance)
    per_row = _growing(operation, context, rows=_size(context.rows) + 1)
    return Sample(
        context=replace(context, rows=len(rows)),
        tensors={name: tensor[rows] if name in per_row else tensor for name, tensor in tensors.items()},
        pick=lambda output: output[rows],
    )


def _linear_sample(
    operation: Operation, context: SelectionContext, tensors: Mapping[str, Tensor], chance: random.Random
) -> Sample:
    in_features, out_features = _size(context.in_features), _size(context.out_features)
    rows = _places(_size(context.rows), SAMPLED_VALUES // in_features, chance)
    channels = _places(out_features, SAMPLED_KEY_VALUES // in_features, chance)
    chosen = {
        **dict.fromkeys(_growing(operation, context, rows=_size(context.rows) + 1), rows),
        **dict.fromkeys(_growing(operation, context, out_features=out_features + 1), channels),
    }
    return Sample(
        context=replace(context, rows=len(rows), out_features=len(channels)),
        tensors={name: tensor[chosen[name]] if name in chosen else tensor for name, tensor in tensors.items()},
        pick=lambda output: output[rows][:, channels],
    )


def _growing(operation: Operation, context: SelectionContext, **size: int) -> set[str]:
    """Names of the tensors whose shape follows this size."""
    longer = replace(context, **size)  # type: ignore[arg-type]
    return {
        argument.name
        for argument in operation.present_tensors(context)
        if argument.shape(context) != argument.shape(longer)
    }


def _attention_sample(context: SelectionContext, tensors: Mapping[str, Tensor], chance: random.Random) -> Sample:
    """Each sampled query head, with the keys and values that it attends to, becomes a batch of its own.

    Query rows are taken out of their places, so a causal mask is handed to the reference as a mask of booleans.
    """
    import torch

    length_q, length_k = _size(context.seq_len_q), _size(context.seq_len_k)
    num_heads = _size(context.num_heads)
    transposed = context.layout == "bshd"
    query, key, value = (
        tensors[name].transpose(1, 2) if transposed else tensors[name] for name in ("query", "key", "value")
    )
    affordable = SAMPLED_KEY_VALUES // (length_k * max(_size(context.head_dim), _size(context.v_head_dim)))
    heads_in_all = _size(context.batch_size) * num_heads
    count = min(heads_in_all, max(MIN_HEADS, min(affordable, MAX_HEADS)))
    heads = torch.tensor(sorted(chance.sample(range(heads_in_all), count)), device=query.device)
    batch, head = heads // num_heads, heads % num_heads
    kv_head = head // _size(context.gqa_group)
    rows = _places(length_q, SAMPLED_VALUES // (count * length_k), chance)
    row = torch.tensor(rows, device=query.device)

    def take_rows(laid_out: Tensor) -> Tensor:
        return laid_out[batch.unsqueeze(1), head.unsqueeze(1), row.unsqueeze(0)].unsqueeze(1)

    sampled = {
        "query": take_rows(query),
        "key": key[batch, kv_head].unsqueeze(1),
        "value": value[batch, kv_head].unsqueeze(1),
    }
    if context.is_causal:
        offset = length_k - length_q if context.causal_alignment == "bottom_right" else 0
        column = torch.arange(length_k, device=query.device)
        sampled["attn_mask"] = column.unsqueeze(0) <= row.unsqueeze(1) + offset
    smaller = replace(
        context,
        operation="attention.cross",
        layout="bhsd",
        attn_mask="bool" if context.is_causal else "none",
        batch_size=count,
        num_heads=1,
        num_kv_heads=1,
        seq_len_q=len(rows),
    )
    return Sample(smaller, sampled, lambda output: take_rows(output.transpose(1, 2) if transposed else output))


def _places(length: int, count: int, chance: random.Random) -> list[int]:
    """About `count` places below `length`, in order, with the first and the last: kernels go wrong at the edges."""
    inner = chance.sample(range(length), min(length, max(count, MIN_ROWS) - 2))
    return sorted({0, length - 1, *inner})


def _size(value: int | None) -> int:
    """A size that the operation requires, and that `Operation.validate` has found."""
    assert value is not None
    return value
