"""Coverage: which part of the key space the measured cells vouch for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.form import Box

# A cell vouches for sizes within this factor on every axis: half of the widest step (16x) between neighbours of a grid.
REACH = 4.0


def bounds_of(cells: Sequence[Sizes]) -> Box:
    """The smallest and largest measured size of each axis."""
    return tuple((min(sizes), max(sizes)) for sizes in zip(*cells, strict=True))


def max_product_of(cells: Sequence[Sizes], free: Sequence[int]) -> int | None:
    """The largest measured product of the free sizes; None if the box's far corner was measured itself.

    Tunings leave out the corner where all sizes are large, by time or memory; its border is a product.
    """
    corner = math.prod(max(cell[axis] for cell in cells) for axis in free)
    largest = max(math.prod(cell[axis] for axis in free) for cell in cells)
    return None if largest == corner else largest


def unmeasured_cells(cells: Sequence[Sizes], free: Sequence[int], max_product: int | None) -> tuple[Sizes, ...]:
    """Crossings of the measured grid lines that no measured cell reaches: around them a table misses.

    Those whose surroundings, halfway to the lines before, lie wholly beyond the largest product are left out: there it
    misses anyway.
    """
    lines = [sorted({cell[axis] for cell in cells}) for axis in free]
    before = [dict(zip(line, (line[0], *line), strict=False)) for line in lines]
    logs = [[math.log(cell[axis]) for axis in free] for cell in cells]
    reach = math.log(REACH) + 1e-9
    found: list[Sizes] = []
    for crossing in itertools.product(*lines):
        nearest = math.prod(math.sqrt(size * low[size]) for size, low in zip(crossing, before, strict=True))
        if max_product is not None and nearest >= max_product:
            continue
        at = [math.log(size) for size in crossing]
        if not any(all(abs(a - b) <= reach for a, b in zip(at, cell, strict=True)) for cell in logs):
            found.append(_with_tied(crossing, cells[0], free))
    return tuple(found)


def _with_tied(crossing: Sizes, example: Sizes, free: Sequence[int]) -> Sizes:
    """The sizes on all axes: a tied axis repeats the one before it."""
    sizes = list(example)
    values = iter(crossing)
    for axis in range(len(sizes)):
        sizes[axis] = next(values) if axis in free else sizes[axis - 1]
    return tuple(sizes)
