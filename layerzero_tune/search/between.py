"""Points between measured ones: where the winners differ, to place an edge; elsewhere, off a bucket's centre.

A size that need not be exact is the roundest in its surroundings, a multiple of a high power of two: widths of models
are, lengths and batches often, and a kernel whose tiles such a size fills can be another one than beside it. What has
been called goes by its own sizes; those between are the ones to guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.compile.regret import RegretModel, place_of

# Neighbours that are closer than this (in octaves) are not parted further: edges lie within a few percent then.
CLOSEST = 0.25
# A crossing that is expected closer to one of two neighbours than this share of the way is looked for no closer: what
# is measured there parts the way better, if the crossing is not where it is expected.
_NEAREST_SHARE = 0.2
# How far (as a share of the way) a rounder size may lie from the point that is looked for; not beyond half of the way
# from there to either neighbour.
_ROUNDING_SHARE = 0.25


@dataclass(frozen=True)
class Between:
    """A point between two measured neighbours, and whether different choices win at these."""

    sizes: Sizes
    context: SelectionContext
    is_edge: bool


def points_between(operation: Operation, model: RegretModel) -> tuple[Between, ...]:
    """A point between each measured cell and the nearest one that lies further along an axis, more than anywhere else:
    where the times of their winners are expected to cross, or halfway.

    Sizes keep the common divisor that the measured ones have on their axis, and are the roundest within
    `_ROUNDING_SHARE` of the way; where times are expected to cross, those without such a divisor are as near as can be,
    and so are all where round ones are measured already or no call of the operation. Points that are left without a
    call, or have another static key, are left out. In ascending order of sizes.
    """
    cells = model.verdicts
    multiples = [math.gcd(*(cell.sizes[axis] for cell in cells)) for axis in range(len(operation.axes))]
    example = cells[0].context
    known = {cell.sizes for cell in cells}
    found: dict[Sizes, Between] = {}
    for first, second in _neighbours(cells, model.free):
        is_edge = not first.acceptable & second.acceptable
        share = _crossing(first, second) if is_edge else 0.5
        rounded = [multiple > 1 or not is_edge for multiple in multiples]
        possible = (
            Between(sizes, context, is_edge)
            for by_rounding in (rounded, [False] * len(multiples))
            if (sizes := _between(first.sizes, second.sizes, share, model.free, multiples, by_rounding)) not in known
            and (context := _call(operation, example, sizes)) is not None
        )
        point = next(possible, None)
        if point is not None and (is_edge or point.sizes not in found):
            found[point.sizes] = point
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


def _crossing(first: Verdict, second: Verdict) -> float:
    """The share of the way (in log space) at which the second's best overtakes the first's."""
    behind, ahead = (_lead(verdict, first.best, second.best) for verdict in (first, second))
    if not math.isfinite(behind - ahead) or behind <= ahead:
        return 0.5
    share = round(behind / (behind - ahead), 9)
    return min(max(share, _NEAREST_SHARE), 1.0 - _NEAREST_SHARE)


def _lead(verdict: Verdict, one: Choice, other: Choice) -> float:
    """log(time of the other / time of the one) at a cell; not finite where one has no time."""
    standings = verdict.standings
    return standings[other].log_ratio - standings[one].log_ratio if {one, other} <= standings.keys() else math.nan


def _between(
    first: Sizes, second: Sizes, share: float, free: Sequence[int], multiples: Sequence[int], rounded: Sequence[bool]
) -> Sizes:
    sizes: list[int] = []
    rounding_share = min(_ROUNDING_SHARE, share / 2.0, (1.0 - share) / 2.0)
    for axis, (start, end) in enumerate(zip(first, second, strict=True)):
        if axis not in free:
            sizes.append(sizes[-1])
            continue
        way = math.log(end / start)
        exact = start * math.exp(share * way)
        reach = math.exp(abs(way) * rounding_share) if rounded[axis] else 1.0
        size = roundest(exact, reach, multiples[axis])
        sizes.append(min(max(size, min(start, end)), max(start, end)))
    return tuple(sizes)


def roundest(exact: float, reach: float, multiple: int) -> int:
    """Of the multiples that lie within a factor of `reach` of the exact size, the nearest of those that the highest
    power of two divides further; the nearest multiple of all where none lies within."""
    least = max(1, math.ceil(round(exact / reach / multiple, 6)))
    most = math.floor(round(exact * reach / multiple, 6))
    step = 1
    # The next step has a multiple within as long as there are more below `most` than below `least`.
    while most // (2 * step) > (least - 1) // (2 * step):
        step *= 2
    count = round(round(exact / multiple, 6) / step) * step
    if least <= most:
        count = min(max(count, math.ceil(least / step) * step), most // step * step)
    return count * multiple


def _call(operation: Operation, example: SelectionContext, sizes: Sizes) -> SelectionContext | None:
    context = operation.with_sizes(example, sizes)
    try:
        operation.validate(context)
    except ContextError:
        return None
    same = operation.static_key(context) == operation.static_key(example) and operation.sizes(context) == sizes
    return context if same else None
