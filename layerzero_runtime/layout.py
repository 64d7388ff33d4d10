"""Memory layouts: calling a kernel of one layout with tensors of the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor


def adapt_layout(function: KernelFunction, spec: KernelSpec, context: SelectionContext) -> KernelFunction:
    """The kernel's function as one that takes query, key and value, and gives its output, in `context.layout`.

    BHSD and BSHD differ by a transpose of the head and the sequence dimension, which is a view of strides and copies
    nothing; a kernel that requires contiguous tensors is given copies. A kernel that knows the layout gets its function
    back as it is, and so does one of a context that has none (no heads).
    """
    if context.num_heads is None or context.layout in spec.layouts:
        return function

    def through_views(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        output: Tensor = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *rest)
        return output.transpose(1, 2)

    def through_copies(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        return through_views(*(_other_way_in_memory(tensor) for tensor in (query, key, value)), *rest)

    return through_copies if spec.requires_contiguous else through_views


def _other_way_in_memory(tensor: Tensor) -> Tensor:
    """Equal in shape and values, and contiguous once dimensions 1 and 2 are transposed."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
