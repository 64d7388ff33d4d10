"""How much there is to do in a call."""

from __future__ import annotations

import math

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named

# Bytes of the widest element, a float64.
WIDEST_BYTES = 8


def call_elements(context: SelectionContext) -> int:
    """Elements of the call's tensors and results together."""
    operation = operation_named(context.operation)
    shapes = [tensor.shape(context) for tensor in operation.present_tensors(context)]
    return sum(map(math.prod, (*shapes, *operation.outputs(context))))
