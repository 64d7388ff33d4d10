"""Placing an edge between two neighbouring grid lines: where the choices of both sides cost the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from layerzero_tune.compile.cell import Cell
from layerzero_tune.compile.judge import Choice


def edge_between(cells: Sequence[Cell], axis: int, low: int, high: int) -> int:
    """The last size of the side below, from `low` to `high` - 1; these are sizes of the cells with none in between.

    The choices are those that suit the cells at `low` and at `high` best: a third may win between two that win further
    out. Where they cost the same is interpolated in log space from their times.
    """
    at_low, at_high = _at(cells, axis, low), _at(cells, axis, high)
    best_low, best_high = _cheapest(at_low), _cheapest(at_high)
    if best_low == best_high:
        # The split sets apart cells that need another choice: the side that has them ends at its cells.
        mixed_low, mixed_high = (any(best_low not in cell.acceptable for cell in found) for found in (at_low, at_high))
        at = math.log(low) + (0.5 + 0.5 * (mixed_high - mixed_low)) * (math.log(high) - math.log(low))
    else:
        crossings = list(_crossings(cells, axis, low, best_low, best_high))
        if crossings:
            at = math.fsum(at * weight for at, weight in crossings) / math.fsum(weight for _, weight in crossings)
        else:
            at = _interpolated(
                low, high, _mean_lead(at_low, best_low, best_high), _mean_lead(at_high, best_high, best_low)
            )
    return min(max(math.floor(math.exp(at) + 1e-6), low), high - 1)


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
