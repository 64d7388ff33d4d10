"""Where a call lies among all that are measured: under its static key, at its sizes."""

from __future__ import annotations

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes, StaticKey
from layerzero_runtime.operations import operation_named

Key = tuple[str, StaticKey]  # operation and static key


def key_of(context: SelectionContext) -> Key:
    """The operation and the static key of a call."""
    operation = operation_named(context.operation)
    return operation.name, operation.static_key(context)


def cell_of(context: SelectionContext) -> tuple[Key, Sizes]:
    """The key and the sizes of a call."""
    return key_of(context), operation_named(context.operation).sizes(context)
