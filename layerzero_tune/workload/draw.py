"""Drawing shapes between measured ones: probes for a tuning, held-out shapes for an evaluation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Axis, Operation
from layerzero_runtime.operations import operation_named
from layerzero_tune.identity import canonical_json
from layerzero_tune.workload.errors import WorkloadError

# Neighbours on the measured grid are at most this factor apart on each axis.
NEIGHBOUR_FACTOR = 16.0
# Models' widths are multiples of 64; head counts and lengths are whatever comes.
WIDTHS = ("hidden_size", "in_features", "out_features")
WIDTH_MULTIPLE = 64
_ATTEMPTS = 200


def draw_between(measured: Iterable[SelectionContext], count: int, seed: int) -> tuple[SelectionContext, ...]:
    """`count` contexts, spread evenly over the static keys of the measured ones.

    Each lies between two measured neighbours of its key, log-uniformly on each axis, and repeats no measured point. Its
    heads are another split of batch x kv heads than the neighbours'. Equal input and seed give equal contexts.

    Raises:
        WorkloadError: the measured points leave no room between them.
    """
    keys: dict[str, list[SelectionContext]] = {}
    for context in sorted(set(measured), key=lambda context: canonical_json(context.to_dict())):
        operation = operation_named(context.operation)
        keys.setdefault(repr((operation.name, operation.static_key(context))), []).append(context)
    chance = random.Random(seed)
    drawn: list[SelectionContext] = []
    seen = {context for found in keys.values() for context in found}
    open_keys = sorted(key for key, found in keys.items() if len(found) > 1)
    chance.shuffle(open_keys)
    while len(drawn) < count:
        if not open_keys:
            raise WorkloadError(
                f"only {len(drawn)} of {count} shapes fit between the measured points; measure more of them"
            )
        for key in tuple(open_keys):
            if len(drawn) == count:
                break
            found_between = _draw_one(keys[key], seen, chance)
            if found_between is None:
                open_keys.remove(key)
            else:
                seen.add(found_between)
                drawn.append(found_between)
    return tuple(drawn)


def _draw_one(
    measured: Sequence[SelectionContext], seen: set[SelectionContext], chance: random.Random
) -> SelectionContext | None:
    operation = operation_named(measured[0].operation)
    taken = {operation.sizes(context) for context in measured}
    for _ in range(_ATTEMPTS):
        first = chance.choice(measured)
        second = chance.choice([context for context in measured if _are_neighbours(operation, first, context)])
        context = _between(operation, first, second, chance)
        sizes = operation.sizes(context)
        # Where both sizes are large, tunings stop: beyond both neighbours' products nothing was measured.
        covered = math.prod(sizes) <= max(math.prod(operation.sizes(first)), math.prod(operation.sizes(second)))
        if context not in seen and sizes not in taken and covered and _is_of_key(operation, context, first):
            return context
    return None


def _is_of_key(operation: Operation, context: SelectionContext, first: SelectionContext) -> bool:
    """Whether the drawn context is still a call of the operation and key that it was drawn from."""
    crosses = operation.name != "attention.cross" or context.seq_len_q != context.seq_len_k
    return crosses and operation.static_key(context) == operation.static_key(first)


def _are_neighbours(operation: Operation, first: SelectionContext, second: SelectionContext) -> bool:
    pairs = zip(operation.sizes(first), operation.sizes(second), strict=True)
    return all(max(a, b) <= NEIGHBOUR_FACTOR * min(a, b) for a, b in pairs)


def _between(
    operation: Operation, first: SelectionContext, second: SelectionContext, chance: random.Random
) -> SelectionContext:
    sizes: list[int] = []
    for axis, low, high in zip(operation.axes, operation.sizes(first), operation.sizes(second), strict=True):
        if axis.is_tied(first):
            sizes.append(sizes[-1])
        else:
            sizes.append(_size(axis, low, high, chance.random()))
    context = operation.with_sizes(first, tuple(sizes))
    return _with_heads(context, chance)


def _size(axis: Axis, low: int, high: int, share: float) -> int:
    size = round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
    smallest, largest = min(low, high), max(low, high)
    if axis.name in WIDTHS and smallest % WIDTH_MULTIPLE == largest % WIDTH_MULTIPLE == 0:
        size = round(size / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return min(max(size, smallest), largest)


def _with_heads(context: SelectionContext, chance: random.Random) -> SelectionContext:
    """The same sizes with batch x kv heads split at random."""
    product = context.batch_kv_heads
    if product is None or context.gqa_group is None:
        return context
    heads = chance.choice([number for number in range(1, min(product, 64) + 1) if product % number == 0])
    changes: dict[str, Any] = {
        "batch_size": product // heads,
        "num_kv_heads": heads,
        "num_heads": heads * context.gqa_group,
    }
    return replace(context, **changes)
