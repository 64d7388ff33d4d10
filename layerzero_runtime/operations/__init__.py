"""The operations, one file per family. To add one, write its file and name it here."""

from __future__ import annotations

from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import attention, linear, mlp, norm

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (*attention.OPERATIONS, *norm.OPERATIONS, *mlp.OPERATIONS, *linear.OPERATIONS)
}


def operation_named(name: str) -> Operation:
    """The operation of that name.

    Raises:
        ContextError: there is none.
    """
    try:
        return OPERATIONS[name]
    except (KeyError, TypeError):
        raise ContextError(f"operation is {name!r}, known operations: {', '.join(OPERATIONS)}") from None
