"""Coverage: which part of the key space the measured cells vouch for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.region import Box
from layerzero_tune.compile.regret import VOUCHED, place_of, vouching
from layerzero_tune.measure.statistics import LOG_RESOLUTION


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


# Of lines closer together than this factor one stands for the others: what a cell vouches for reaches further.
_LEAST_STEP = 1.4


def unmeasured_cells(cells: Sequence[Sizes], free: Sequence[int], max_product: int | None) -> tuple[Sizes, ...]:
    """Crossings of grid lines that no measured cell vouches for: around them a table misses.

    The lines are those of the measured cells; where two neighbours are so far apart that the sizes halfway between them
    are vouched for by neither, further lines lie between them. Where they lie close, as of cells that are on no grid,
    few of them say the same as all. Crossings whose surroundings, halfway to the lines before, lie wholly beyond the
    largest product are left out: there it misses anyway.
    """
    lines = [_thinned(_filled(sorted({cell[axis] for cell in cells}))) for axis in free]
    before = [dict(zip(line, (line[0], *line), strict=False)) for line in lines]
    places = np.array([place_of(cell, free) for cell in cells])
    found: list[Sizes] = []
    for crossing in itertools.product(*lines):
        nearest = math.prod(math.sqrt(size * low[size]) for size, low in zip(crossing, before, strict=True))
        if max_product is not None and nearest >= max_product:
            continue
        sizes = with_tied(crossing, cells[0], free)
        if not vouching(places, place_of(sizes, free)).any():
            found.append(sizes)
    return tuple(found)


def _thinned(line: Sequence[int]) -> list[int]:
    """The sizes without those that are close to the one before; the first and the last are kept."""
    kept = [line[0]]
    for size in line[1:]:
        if size >= kept[-1] * _LEAST_STEP:
            kept.append(size)
    if kept[-1] != line[-1]:
        kept[1:] = [*kept[1:-1], line[-1]]
    return kept


def _filled(line: Sequence[int]) -> list[int]:
    """The sizes with further ones, evenly spaced in log space and of the same multiple, in gaps that are too wide."""
    widest = 2.0 * math.log(VOUCHED) + LOG_RESOLUTION
    multiple = math.gcd(*line)
    filled = [line[0]]
    for low, high in itertools.pairwise(line):
        steps = math.ceil(round((math.log(high) - math.log(low)) / widest, 9))
        spaced = (low * math.exp((math.log(high) - math.log(low)) * step / steps) for step in range(1, steps))
        filled += [*(round(round(size, 6) / multiple) * multiple for size in spaced), high]
    return filled


def with_tied(values: Sequence[int], example: Sizes, free: Sequence[int]) -> Sizes:
    """The sizes on all axes, of those on the free ones: a tied axis repeats the one before it."""
    sizes = list(example)
    left = iter(values)
    for axis in range(len(sizes)):
        sizes[axis] = next(left) if axis in free else sizes[axis - 1]
    return tuple(sizes)
