"""Local linear regression: a plane through the values nearby, without a linear algebra library.

Sums are exact (`math.fsum`) and the elimination is plain arithmetic, so equal input gives equal bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

Vector = tuple[float, ...]


def local_plane(
    weights: Sequence[float], offsets: Sequence[Vector], values: Sequence[float], ridge: float
) -> tuple[float, Vector]:
    """The weighted least squares plane: its height at the origin of the offsets, and its slope along each axis.

    The weights add up to 1. `ridge` is added to the variance of each axis (in squared units of an offset), which makes
    the slopes small where the offsets hardly tell; it must be above 0, so that there is always a solution (Hoerl and
    Kennard, 1970; locally weighted: Cleveland and Devlin, 1988).
    """
    columns = list(zip(*offsets, strict=True))
    axes = range(len(columns))
    center = [dot(weights, column) for column in columns]
    level = dot(weights, values)
    steps = [[at - middle for at in column] for column, middle in zip(columns, center, strict=True)]
    heights = [value - level for value in values]
    equations = [
        [
            *(dot(weights, list(map(mul, steps[row], steps[column]))) + ridge * (row == column) for column in axes),
            dot(weights, list(map(mul, steps[row], heights))),
        ]
        for row in axes
    ]
    slopes = _solved(equations)
    return level - dot(slopes, center), slopes


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(map(mul, first, second))


def _solved(equations: list[list[float]]) -> Vector:
    """Gauss-Jordan elimination; a matrix of variances plus a ridge is positive definite and needs no pivoting."""
    axes = range(len(equations))
    for pivot in axes:
        for row in axes:
            if row != pivot:
                factor = equations[row][pivot] / equations[pivot][pivot]
                equations[row] = [a - factor * b for a, b in zip(equations[row], equations[pivot], strict=True)]
    return tuple(equations[axis][-1] / equations[axis][axis] for axis in axes)
