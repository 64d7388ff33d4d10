"""Placing the edge of a split: where the choices of both sides cost the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.cell import Cell
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import product_of
from layerzero_tune.compile.split import Place

# The cells on either side that tell which choices meet at an edge over a product: those up to this factor away.
_BESIDE = 4
# How far from the middle of such an edge a cell still tells where they meet, with a weight that falls to 0.
_REACH = 16.0


def edge_at(cells: Sequence[Cell], place: Place) -> int:
    """The last size (product over the axes) of the side below, from `place.low` to `place.high` - 1."""
    at = _between_lines(cells, place) if len(place.axes) == 1 else _across(cells, place)
    inside = min(max(at, math.log(place.low)), math.log(place.high))
    return min(max(math.floor(math.exp(inside) + 1e-6), place.low), place.high - 1)


def _between_lines(cells: Sequence[Cell], place: Place) -> float:
    """Log of the size between two neighbouring grid lines at which an edge on one axis belongs."""
    crossings = list(_crossings(cells, place))
    if crossings:
        return math.fsum(at * weight for at, weight in crossings) / math.fsum(weight for _, weight in crossings)
    (axis,) = place.axes
    low, high = ([cell for cell in cells if cell.sizes[axis] == size] for size in (place.low, place.high))
    ahead, behind = _cheapest(low), _cheapest(high)
    return _interpolated(place.low, place.high, _mean_lead(low, ahead, behind), _mean_lead(high, behind, ahead))


def _across(cells: Sequence[Cell], place: Place) -> float:
    """Log of the product at which an edge belongs that runs across the axes: the root of the weighted regression line
    of one choice's lead over the other on the log of the product; half way where there is none."""
    products = [product_of(cell.sizes, place.axes) for cell in cells]
    below = [cell for cell, size in zip(cells, products, strict=True) if size <= place.low <= size * _BESIDE]
    above = [cell for cell, size in zip(cells, products, strict=True) if place.high <= size <= place.high * _BESIDE]
    best_low, best_high = _cheapest(below), _cheapest(above)
    middle = (math.log(place.low) + math.log(place.high)) / 2.0
    reach = (math.log(place.high) - math.log(place.low)) / 2.0 + math.log(_REACH)
    points = [
        (1.0 - abs(at) / reach, at, lead)
        for cell, at in zip(cells, (math.log(size) - middle for size in products), strict=True)
        if abs(at) < reach and (lead := cell.lead(best_low, best_high)) is not None
    ]
    total = math.fsum(weight for weight, _, _ in points)
    if best_low == best_high or not total:
        return middle
    center = math.fsum(weight * at for weight, at, _ in points) / total
    level = math.fsum(weight * lead for weight, _, lead in points) / total
    variance = math.fsum(weight * (at - center) ** 2 for weight, at, _ in points)
    covariance = math.fsum(weight * (at - center) * (lead - level) for weight, at, lead in points)
    return middle + center - level * variance / covariance if covariance < 0.0 else middle


def _crossings(cells: Sequence[Cell], place: Place) -> Iterator[tuple[float, float]]:
    """(log of the size, weight) of the crossing in each column of cells in which no choice suits both sides.

    Two cells that lie closer together along the axis say more: the weight falls with the square of the distance.
    """
    (axis,) = place.axes
    columns: dict[Sizes, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.sizes[axis]):
        columns.setdefault(cell.sizes[:axis] + cell.sizes[axis + 1 :], []).append(cell)
    for _, column in sorted(columns.items()):
        below = [cell for cell in column if cell.sizes[axis] <= place.low][-1:]
        above = [cell for cell in column if cell.sizes[axis] > place.low][:1]
        if below and above and below[0].acceptable.isdisjoint(above[0].acceptable):
            first, last = below[0].sizes[axis], above[0].sizes[axis]
            ahead, behind = _cheapest(below), _cheapest(above)
            at = _interpolated(first, last, below[0].lead(ahead, behind), above[0].lead(behind, ahead))
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
