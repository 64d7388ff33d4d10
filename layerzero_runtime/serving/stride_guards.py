"""Functions of leaves whose plans depend on strides, which are looked at in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.tensors import FIELD_READERS

Guards = tuple[Limit, ...]

# What a spec's `requires_contiguous` and `requires_last_dim_stride1` become.
_CONTIGUOUS = Limit("is_contiguous", "one_of", (True,))
_UNIT_STRIDE = Limit("stride_last_dim", "one_of", (1,))


def guarded_by_strides(
    steps: Sequence[tuple[Guards, KernelFunction]], otherwise: KernelFunction, tensors: int
) -> KernelFunction:
    """A function that calls that of the first step whose guards the call's tensors pass, or `otherwise`, without
    describing the call. The guards are on fields of `FIELD_READERS`; `tensors` says how many arguments are tensors,
    which come first."""
    checks = tuple(
        (tuple((FIELD_READERS[limit.field], limit.accepts) for limit in guards), function) for guards, function in steps
    )

    def guarded(*arguments: Any) -> Any:
        given = arguments[:tensors]
        for guards, function in checks:
            if all(accepts(read(given)) for read, accepts in guards):
                return function(*arguments)
        return otherwise(*arguments)

    guards, function = steps[0]
    # Contiguous tensors have a last stride of 1 as well, but for dimensions of one element, which do not count.
    if set(guards) <= {_CONTIGUOUS, _UNIT_STRIDE} and tensors in _CONTIGUOUS_FIRST:
        if _CONTIGUOUS in guards:
            return _CONTIGUOUS_FIRST[tensors](function, guarded)
        if tensors == 3:
            return _three_unit_strides(function, guarded)
    return guarded


# The usual call passes the first step's guards, which these find out 1 us sooner than `guarded`.
def _two_contiguous(function: KernelFunction, guarded: KernelFunction) -> KernelFunction:
    def quick(first: Any, second: Any, *rest: Any) -> Any:
        if first.is_contiguous() and second.is_contiguous():
            return function(first, second, *rest)
        return guarded(first, second, *rest)

    return quick


def _three_contiguous(function: KernelFunction, guarded: KernelFunction) -> KernelFunction:
    def quick(first: Any, second: Any, third: Any, *rest: Any) -> Any:
        if first.is_contiguous() and second.is_contiguous() and third.is_contiguous():
            return function(first, second, third, *rest)
        return guarded(first, second, third, *rest)

    return quick


def _three_unit_strides(function: KernelFunction, guarded: KernelFunction) -> KernelFunction:
    def quick(first: Any, second: Any, third: Any, *rest: Any) -> Any:
        if first.stride(-1) == 1 and second.stride(-1) == 1 and third.stride(-1) == 1:
            return function(first, second, third, *rest)
        return guarded(first, second, third, *rest)

    return quick


_CONTIGUOUS_FIRST = {2: _two_contiguous, 3: _three_contiguous}
