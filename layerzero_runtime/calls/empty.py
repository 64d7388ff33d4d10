"""Calls without elements: their results follow from the shapes, without a kernel."""

from __future__ import annotations

from torch import Tensor

from layerzero_runtime.operation import Operation


def empty_outputs(operation: Operation, tensors: list[Tensor], layout: str | None) -> tuple[Tensor, ...] | None:
    """The empty results of a call, None where they have elements (queries without keys) or the shapes do not fit."""
    first = tensors[0]
    if any(tensor.dtype != first.dtype or tensor.device != first.device for tensor in tensors):
        return None
    if layout is None:
        fitting = (first.shape, first.shape[-1:])
        if not first.dim() or first.numel() or any(tensor.shape not in fitting for tensor in tensors):
            return None
        return tuple(first.new_empty(first.shape) for _ in range(2 if operation.name == "norm.add_rms" else 1))
    query, key, value = tensors[:3]
    if not query.dim() == key.dim() == value.dim() == 4 or query.numel() or not query.shape[3]:
        return None
    heads = 1 if layout == "bhsd" else 2
    fits = (
        query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and key.shape[heads] > 0
        and query.shape[heads] % key.shape[heads] == 0
    )
    return (query.new_empty((*query.shape[:3], value.shape[3])),) if fits and len(tensors) == 3 else None
