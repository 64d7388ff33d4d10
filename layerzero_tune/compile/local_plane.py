"""Local linear regression: planes through the values nearby, at many places at once.

Sums run in the order of the cells and the elimination is plain arithmetic, so equal input gives equal bits on every
machine: numpy's own sums and products of matrices depend on the width of a processor's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerzero_tune.compile.arrays import Floats


def local_planes(
    weights: Floats, offsets: Sequence[Floats], values: Floats, ridge: Floats
) -> tuple[Floats, list[Floats]]:
    """The weighted least squares planes: their heights at the places, (places,), and slopes, (places,) for each axis.

    `weights` (cells, places) add up to 1 over the cells, `offsets` (cells, places) for each axis lead from the places
    to the cells, `values` (cells, places) are those at the cells. `ridge` (places,) is added to the variance of each
    axis (in squared units of an offset), which makes the slopes small where the offsets hardly tell; it must be above
    0, so that there is always a solution (Hoerl and Kennard, 1970; locally weighted: Cleveland and Devlin, 1988).
    """
    axes = range(len(offsets))
    center = [total(weights * offset) for offset in offsets]
    level = total(weights * values)
    steps = [offset - middle for offset, middle in zip(offsets, center, strict=True)]
    heights = values - level
    # The same on either side of the diagonal, to the last bit.
    products = {
        (row, column): total(weights * (steps[row] * steps[column])) for row in axes for column in axes[: row + 1]
    }
    equations = [
        [
            *(products[max(row, column), min(row, column)] + ridge * (row == column) for column in axes),
            total(weights * (steps[row] * heights)),
        ]
        for row in axes
    ]
    slopes = _solved(equations)
    at_place = level
    for slope, middle in zip(slopes, center, strict=True):
        at_place = at_place - slope * middle
    return at_place, slopes


def total(values: Floats) -> Floats:
    """The sums over the first of two axes, in its order."""
    if values.shape[1] == 1:  # numpy takes it for a line, whose parts it adds in another order
        sums: Floats = np.cumsum(values, axis=0)[-1]
    else:
        sums = np.add.reduce(values, axis=0)
    return sums


def sum_of(parts: Sequence[Floats]) -> Floats:
    """The sum of arrays of one shape, in their order."""
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _solved(equations: list[list[Floats]]) -> list[Floats]:
    """Gauss-Jordan elimination; a matrix of variances plus a ridge is positive definite and needs no pivoting."""
    axes = range(len(equations))
    for pivot in axes:
        for row in axes:
            if row != pivot:
                factor = equations[row][pivot] / equations[pivot][pivot]
                equations[row] = [a - factor * b for a, b in zip(equations[row], equations[pivot], strict=True)]
    return [equations[axis][-1] / equations[axis][axis] for axis in axes]
