"""Points between measured ones: where the winners differ, to place an edge; elsewhere, off a bucket's centre."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.judge import Verdict
from layerzero_tune.compile.regret import RegretModel, place_of

# Neighbours that are closer than this (in octaves) are not parted further: edges lie within a few percent then.
CLOSEST = 0.25


@dataclass(frozen=True)
class Between:
    """A point halfway between two measured neighbours, and whether different choices win at these."""

    sizes: Sizes
    context: SelectionContext
    is_edge: bool


def points_between(operation: Operation, model: RegretModel) -> tuple[Between, ...]:
    """A point between each measured cell and the nearest one that lies further along an axis, more than anywhere else.

    Sizes keep the common divisor that the measured ones have on their axis. Calls that the operation does not have, or
    that have another static key, are left out. In ascending order of sizes.
    """
    cells = model.verdicts
    multiples = [math.gcd(*(cell.sizes[axis] for cell in cells)) for axis in range(len(operation.axes))]
    example = cells[0].context
    known = {cell.sizes for cell in cells}
    found: dict[Sizes, Between] = {}
    for first, second in _neighbours(cells, model.free):
        sizes = _middle(first.sizes, second.sizes, model.free, multiples)
        context = _call(operation, example, sizes)
        if sizes in known or context is None:
            continue
        is_edge = not first.acceptable & second.acceptable
        if sizes not in found or is_edge:
            found[sizes] = Between(sizes, context, is_edge)
    return tuple(found[sizes] for sizes in sorted(found))


def _neighbours(cells: Sequence[Verdict], free: Sequence[int]) -> Iterator[tuple[Verdict, Verdict]]:
    places = np.array([place_of(cell.sizes, free) for cell in cells])
    for cell, place in zip(cells, places, strict=True):
        offsets = places - place
        distances = np.sqrt((offsets * offsets).sum(axis=1))
        for axis in range(len(free)):
            # Along this axis more than along all others together.
            along = np.flatnonzero((offsets[:, axis] > 0.0) & (2.0 * offsets[:, axis] ** 2 >= distances**2))
            if len(along):
                nearest = int(along[distances[along].argmin()])
                if distances[nearest] >= CLOSEST:
                    yield cell, cells[nearest]


def _middle(first: Sizes, second: Sizes, free: Sequence[int], multiples: Sequence[int]) -> Sizes:
    sizes: list[int] = []
    for axis, (low, high) in enumerate(zip(first, second, strict=True)):
        if axis not in free:
            sizes.append(sizes[-1])
            continue
        multiple = multiples[axis]
        middle = round(round(math.sqrt(low * high), 6) / multiple) * multiple
        sizes.append(min(max(middle, min(low, high)), max(low, high)))
    return tuple(sizes)


def _call(operation: Operation, example: SelectionContext, sizes: Sizes) -> SelectionContext | None:
    context = operation.with_sizes(example, sizes)
    try:
        operation.validate(context)
    except ContextError:
        return None
    same = operation.static_key(context) == operation.static_key(example) and operation.sizes(context) == sizes
    return context if same else None
