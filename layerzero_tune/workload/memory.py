"""What a device's memory holds of a contest at a point."""

from __future__ import annotations

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.work import call_elements

_ITEM_BYTES = 2  # of bfloat16 and float16
# A contest holds a call's tensors, a copy to see whether a kernel writes to them, the set that is timed, and what some
# kernels make of them: keys and values repeated for every query head that shares them.
_CALLS_HELD = 6


def fits(context: SelectionContext, memory_bytes: int) -> bool:
    """Whether so much memory holds what a contest at the point needs."""
    return _CALLS_HELD * _ITEM_BYTES * call_elements(context) <= memory_bytes
