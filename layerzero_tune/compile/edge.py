"""Placing the edge of a split: where the choices of both sides cost the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from layerzero_tune.compile.cell import Cell
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import Axes, product_of
from layerzero_tune.compile.split import Place

# The cells on either side that tell which choices meet at an edge over a product: those up to this factor away.
_BESIDE = 4.0
# How far from the middle of such an edge a cell still tells where they meet, with a weight that falls to 0.
_REACH = 16.0


def edge_at(cells: Sequence[Cell], place: Place) -> int:
    """The last size (product over the axes) of the side below, from `place.low` to `place.high` - 1."""
    if len(place.axes) == 1:
        at = _between_lines(cells, place.axes[0], place.low, place.high)
    else:
        at = _across(cells, place.axes, place.low, place.high)
    return min(max(math.floor(math.exp(at) + 1e-6), place.low), place.high - 1)


def _between_lines(cells: Sequence[Cell], axis: int, low: int, high: int) -> float:
    """Log of the size between two neighbouring grid lines at which an edge belongs.

    The choices are those that suit the cells at `low` and at `high` best: a third may win between two that win further
    out. Where they cost the same is interpolated in log space from their times.
    """
    at_low, at_high = _at(cells, axis, low), _at(cells, axis, high)
    best_low, best_high = _cheapest(at_low), _cheapest(at_high)
    if best_low == best_high:
        # The split sets apart cells that need another choice: the side that has them ends at its cells.
        mixed_low, mixed_high = (any(best_low not in cell.acceptable for cell in found) for found in (at_low, at_high))
        return math.log(low) + (0.5 + 0.5 * (mixed_high - mixed_low)) * (math.log(high) - math.log(low))
    crossings = list(_crossings(cells, axis, low, best_low, best_high))
    if crossings:
        return math.fsum(at * weight for at, weight in crossings) / math.fsum(weight for _, weight in crossings)
    return _interpolated(low, high, _mean_lead(at_low, best_low, best_high), _mean_lead(at_high, best_high, best_low))


def _across(cells: Sequence[Cell], axes: Axes, low: int, high: int) -> float:
    """Log of the product at which an edge belongs that runs across the axes: the root of the weighted regression line
    of one choice's lead over the other on the log of the product; half way where there is none."""
    logs = [math.log(product_of(cell.sizes, axes)) for cell in cells]
    middle, half = (math.log(low) + math.log(high)) / 2.0, (math.log(high) - math.log(low)) / 2.0
    near = half + math.log(_BESIDE)
    best_low = _cheapest([cell for cell, at in zip(cells, logs, strict=True) if middle - near <= at < middle])
    best_high = _cheapest([cell for cell, at in zip(cells, logs, strict=True) if middle < at <= middle + near])
    reach = half + math.log(_REACH)
    points = [
        (1.0 - abs(at - middle) / reach, at - middle, lead)
        for cell, at in zip(cells, logs, strict=True)
        if abs(at - middle) < reach and (lead := cell.lead(best_low, best_high)) is not None
    ]
    total = math.fsum(weight for weight, _, _ in points)
    if best_low == best_high or not total:
        return middle
    center = math.fsum(weight * at for weight, at, _ in points) / total
    level = math.fsum(weight * lead for weight, _, lead in points) / total
    variance = math.fsum(weight * (at - center) ** 2 for weight, at, _ in points)
    covariance = math.fsum(weight * (at - center) * (lead - level) for weight, at, lead in points)
    return middle + center - level * variance / covariance if covariance < 0.0 else middle


def _at(cells: Sequence[Cell], axis: int, size: int) -> Sequence[Cell]:
    return [cell for cell in cells if cell.sizes[axis] == size]


def _crossings(
    cells: Sequence[Cell], axis: int, low: int, best_low: Choice, best_high: Choice
) -> Iterator[tuple[float, float]]:
    """(log of the size, weight) of the crossing in each column of cells in which the choice changes at this edge.

    Two cells that lie closer together along the axis say more: the weight falls with the square of the distance.
    """
    columns: dict[tuple[int, ...], list[Cell]] = {}
    for cell in cells:
        columns.setdefault(cell.column(axis), []).append(cell)
    for _, column in sorted(columns.items()):
        below = max(
            (cell for cell in column if cell.sizes[axis] <= low), key=lambda cell: cell.sizes[axis], default=None
        )
        above = min(
            (cell for cell in column if cell.sizes[axis] > low), key=lambda cell: cell.sizes[axis], default=None
        )
        if below is None or above is None:
            continue
        if best_low in below.acceptable and best_high in above.acceptable:
            first, last = below.sizes[axis], above.sizes[axis]
            at = _interpolated(first, last, below.lead(best_low, best_high), above.lead(best_high, best_low))
            yield at, (math.log(last) - math.log(first)) ** -2


def _interpolated(low: int, high: int, lead_low: float | None, lead_high: float | None) -> float:
    """Log of the size at which two leads meet; half way where they say nothing.

    A side whose choice does not lead, such as a default where the gain on it is not proved, ends at its cells.
    """
    share = 0.5
    if lead_low is not None and lead_high is not None and max(lead_low, lead_high) > 0.0:
        share = max(lead_low, 0.0) / (max(lead_low, 0.0) + max(lead_high, 0.0))
    return math.log(low) + share * (math.log(high) - math.log(low))


def _cheapest(cells: Sequence[Cell]) -> Choice:
    """The choice that costs least over these cells."""
    choices = sorted({choice for cell in cells for choice in cell.acceptable})
    return min(choices, key=lambda choice: (round(math.fsum(cell.cost(choice) for cell in cells), 9), choice))


def _mean_lead(cells: Sequence[Cell], ahead: Choice, behind: Choice) -> float | None:
    """Mean log time by which one choice leads the other over these cells; None without any that has both."""
    leads = [lead for cell in cells if (lead := cell.lead(ahead, behind)) is not None]
    return math.fsum(leads) / len(leads) if leads else None
