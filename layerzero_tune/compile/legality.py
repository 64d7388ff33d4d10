"""Proof of legality: what a kernel's limits mean over a whole bucket."""

from __future__ import annotations

from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation
from layerzero_runtime.selection.limits import Limit
from layerzero_tune.compile.region import Box

# Fields that every static key fixes, or the device of the table.
_KEY_FIELDS = ("mode", "dtype", "platform", "sm", "instruction_set")


# The kinds of limits on a size that a split can keep; others need a guard.
RANGES = ("at_least", "at_most")


@dataclass(frozen=True)
class Legality:
    """What the limits of a kernel say about a bucket.

    Attributes:
        violated: a limit that no call of the bucket satisfies, None without one.
        splits: (axis, edge) at which the bucket must be split, because a range limit runs through it.
        guards: limits that the bucket does not determine, to be checked on each call.
    """

    violated: Limit | None
    splits: tuple[tuple[int, int], ...]
    guards: tuple[Limit, ...]


def legality(kernel: Kernel, operation: Operation, context: SelectionContext, box: Box) -> Legality:
    """Prove each limit over the bucket, split at it, or leave it as a guard.

    `context` gives the static features, with the device of the table.
    """
    low = operation.with_sizes(context, tuple(bounds[0] for bounds in box))
    high = operation.with_sizes(context, tuple(bounds[1] for bounds in box))
    axes = {axis.name: index for index, axis in enumerate(operation.axes)}
    determined = {*_KEY_FIELDS, *operation.static, *operation.plain, *operation.fixed}
    splits: list[tuple[int, int]] = []
    guards: list[Limit] = []
    for limit in kernel.spec.limits:
        if limit.field in determined or getattr(context, limit.field) is None:
            if limit.reject(context) is not None:
                return Legality(limit, (), ())
        elif limit.field in {*operation.monotone, *axes}:
            if limit.kind in RANGES:
                verdicts = limit.reject(low), limit.reject(high)
                if all(verdicts):
                    return Legality(limit, (), ())
                if any(verdicts):
                    axis = _axis_of(operation, limit.field, axes, context)
                    if axis is None:
                        guards.append(limit)
                    else:
                        splits.append((axis, limit.bound if limit.kind == "at_most" else limit.bound - 1))
            elif getattr(low, limit.field) != getattr(high, limit.field):
                guards.append(limit)
            elif limit.reject(low) is not None:
                return Legality(limit, (), ())
        else:
            guards.append(limit)
    return Legality(None, tuple(splits), tuple(guards))


def size_limits(kernel: Kernel, operation: Operation) -> tuple[Limit, ...]:
    """The kernel's limits on what the sizes of a call determine."""
    fields = {*operation.monotone, *(axis.name for axis in operation.axes)}
    return tuple(limit for limit in kernel.spec.limits if limit.field in fields)


def _axis_of(operation: Operation, field: str, axes: dict[str, int], context: SelectionContext) -> int | None:
    """The axis whose size the field is, None for a product of several."""
    if field not in axes:
        # Under equal lengths the key length is the axis of the query length.
        return axes.get("seq_len_q") if field == "seq_len_k" else None
    index = axes[field]
    return index - 1 if operation.axes[index].is_tied(context) else index
