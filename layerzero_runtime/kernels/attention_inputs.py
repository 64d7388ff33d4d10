"""What calls of attention may have that kernels of other libraries cannot take, and what is done about it.

None of it is a feature of a context, since almost no call has it: addresses or strides that do not fit loads of 16
bytes, which are errors of the device there or wrong results, and rows of queries that see no key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.kernels.triton_device import ITEM_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a thread loads at a time.
VECTOR_BYTES = 16

# Elements that signed numbers of 32 bits count.
_COUNTED = 2**31

# Part of the sources of every kernel that calls this file.
SOURCES = ("attention_inputs.py", "triton_device.py")


def device_of(context: SelectionContext) -> torch.device:
    """The device that a kernel is loaded for: the context's, else the current one."""
    import torch

    index = None if context.device is None else context.device.index
    return torch.device("cuda" if index is None else f"cuda:{index}")


def vector_mask(context: SelectionContext) -> int:
    """The bits that no stride in elements may have where vectors of the context's dtype are loaded."""
    return VECTOR_BYTES // ITEM_BYTES[context.dtype] - 1


def are_aligned(query: Tensor, key: Tensor, value: Tensor, mask: int) -> bool:
    """Whether all addresses and all strides but the last are multiples of a vector."""
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & (VECTOR_BYTES - 1):
        return False
    a, b, c, _ = query.stride()
    d, e, f, _ = key.stride()
    g, h, i, _ = value.stride()
    return not (a | b | c | d | e | f | g | h | i) & mask


def are_aligned_and_unexpanded(query: Tensor, key: Tensor, value: Tensor, mask: int) -> bool:
    """Whether, further, no stride is 0."""
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & (VECTOR_BYTES - 1):
        return False
    a, b, c, _ = query.stride()
    d, e, f, _ = key.stride()
    g, h, i, _ = value.stride()
    return not (a | b | c | d | e | f | g | h | i) & mask and bool(a and b and c and d and e and f and g and h and i)


def are_dense_enough(query: Tensor, key: Tensor, value: Tensor, mask: int) -> bool:
    """Whether, further, 32 bits count the elements of each batch: for kernels whose offsets have no more."""
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & (VECTOR_BYTES - 1):
        return False
    a, b, c, _ = query.stride()
    d, e, f, _ = key.stride()
    g, h, i, _ = value.stride()
    if (a | b | c | d | e | f | g | h | i) & mask or not (a and b and c and d and e and f and g and h and i):
        return False
    _, heads, queries, _ = query.shape
    _, kv_heads, keys, _ = key.shape
    return heads * b + queries * c <= _COUNTED and kv_heads * max(e, h) + keys * max(f, i) <= _COUNTED


def dense_copies(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies that are aligned where head dimensions are multiples of a vector, and need no gradients where none are
    recorded."""
    import torch

    dense = torch.contiguous_format
    return query.clone(memory_format=dense), key.clone(memory_format=dense), value.clone(memory_format=dense)


def on_dense(
    function: KernelFunction, context: SelectionContext, is_taken: Callable[..., bool] = are_aligned
) -> KernelFunction:
    """The function, on dense copies where `is_taken(query, key, value, mask)` is not true of the tensors."""
    mask = vector_mask(context)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if not is_taken(query, key, value, mask):
            query, key, value = dense_copies(query, key, value)
        output: Tensor = function(query, key, value, attn_mask, dropout_p, scale)
        return output

    return attend


def on_seeing_rows(function: KernelFunction, *, length: int = 2) -> KernelFunction:
    """The function of a causal mask aligned bottom-right, with zeros, as torch gives, for rows that see no key.

    These are the first ones of calls with more queries than keys. `length` is the dimension of the sequence.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        blind = query.shape[length] - key.shape[length]
        if blind <= 0:
            output: Tensor = function(query, key, value, attn_mask, dropout_p, scale)
            return output
        rows = query.narrow(length, blind, key.shape[length])
        seeing = function(rows, key, value, attn_mask, dropout_p, scale)
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        output.narrow(length, blind, key.shape[length]).copy_(seeing)
        return output

    return attend
