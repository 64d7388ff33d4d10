"""Foreseen sizes: places between the measured ones, where the calls that a table serves will lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.arrays import Floats
from layerzero_tune.compile.coverage import with_tied
from layerzero_tune.compile.local_plane import sum_of
from layerzero_tune.compile.region import Box
from layerzero_tune.compile.regret import Place, place_of, vouching

# How many of them a static key has: evenly over all sizes, and around its cells, where calls are as its tuning's were.
# Of calls of attention in graphs half an octave beside a workload's, trees of an H100's 9,994 contests lose by their
# model 0.0079 with 1,600 evenly; with 400 evenly and 600, 1,200 or 2,400 around 0.0059, 0.0047 and 0.0050.
EVEN, AROUND = 400, 1200
# How far from a cell those around it lie at most, in octaves on every axis. With 0.7 the same loss is 0.0052, with 1
# 0.0063.
_NEAR = 0.5
# Draws for each of the former before giving up: small boxes hold few sizes, beyond the largest product lies nothing.
_DRAWS = 10
_PRIMES = (2, 3, 5, 7)
# In how many ways the sizes around a cell lie: a prime.
_STARTS = 10_007


@dataclass(frozen=True)
class Foreseen:
    """Sizes inside a table's bounds, none of them measured: those that it serves, and those at which it misses."""

    served: tuple[Sizes, ...]
    missed: tuple[Sizes, ...]


def foreseen_sizes(
    cells: Sequence[Sizes],
    holes: Sequence[Sizes],
    free: Sequence[int],
    bounds: Box,
    max_product: int | None,
    tiles: Mapping[int, int] = MappingProxyType({}),
) -> Foreseen:
    """At most `EVEN` sizes evenly over the bounds, and of `AROUND` the same number evenly around each cell, at least
    one, but for those that coincide or lie outside. The table misses at those that no cell vouches for where a hole is
    nearest.

    Evenly is meant in log space (Halton 1960: a low-discrepancy sequence, so that equal cells give equal sizes), in
    multiples of what all measured sizes of an axis are multiples of. `tiles` gives the height of the tiles into which
    sizes of an axis are cut: around a cell whose own size fills its tiles, the others do so too.
    """
    multiples = [math.gcd(*(cell[axis] for cell in cells)) for axis in free]
    places = np.array([place_of(cell, free) for cell in (*cells, *holes)])
    seen = set(cells)
    found: dict[bool, list[Sizes]] = {True: [], False: []}

    def take(drawn: Iterable[float], multiples: Sequence[int]) -> None:
        sizes = [max(m, round(size / m) * m) for size, m in zip(drawn, multiples, strict=True)]
        tied = with_tied(sizes, cells[0], free)
        within = all(bounds[axis][0] <= size <= bounds[axis][1] for axis, size in zip(free, sizes, strict=True))
        if within and tied not in seen and (max_product is None or math.prod(sizes) <= max_product):
            seen.add(tied)
            found[_is_served(places, len(cells), place_of(tied, free))].append(tied)

    lines = [(math.log2(bounds[axis][0]), math.log2(bounds[axis][1])) for axis in free]
    for number in range(1, _DRAWS * EVEN):
        if len(seen) == len(cells) + EVEN:
            break
        take(_drawn(number, lines), multiples)
    each = max(1, AROUND // len(cells))
    for cell, place in zip(cells, places.tolist(), strict=False):
        around = [(max(low, at - _NEAR), min(high, at + _NEAR)) for at, (low, high) in zip(place, lines, strict=True)]
        # By the cell alone: so those of the others stay where they are when a cell comes in.
        start = math.prod(cell) % _STARTS
        filled = [
            math.lcm(m, tiles[axis]) if axis in tiles and cell[axis] % tiles[axis] == 0 else m
            for axis, m in zip(free, multiples, strict=True)
        ]
        for number in range(start + 1, start + each + 1):
            take(_drawn(number, around), filled)
    return Foreseen(tuple(found[True]), tuple(found[False]))


def _drawn(number: int, lines: Sequence[tuple[float, float]]) -> Iterator[float]:
    """The member of the sequence with this number, in a box of logarithms of sizes."""
    for (low, high), prime in zip(lines, _PRIMES, strict=False):
        # Rounded before they become sizes: the last bits of a power differ between machines.
        yield round(2.0 ** (low + _radical_inverse(number, prime) * (high - low)), 6)


def _is_served(places: Floats, cells: int, place: Place) -> bool:
    """Whether one of the cells, which come before the holes, vouches for the place or is nearer than all holes."""
    if cells == len(places) or vouching(places[:cells], place).any():
        return True
    offsets = places - np.array(place)
    return int(sum_of(list((offsets * offsets).T)).argmin()) < cells


@cache
def _radical_inverse(number: int, base: int) -> float:
    """The digits of the number in this base behind the point, in reverse order."""
    return math.fsum(digit * float(base) ** -(place + 1) for place, digit in enumerate(_digits(number, base)))


def _digits(number: int, base: int) -> Iterator[int]:
    while number:
        number, digit = divmod(number, base)
        yield digit
