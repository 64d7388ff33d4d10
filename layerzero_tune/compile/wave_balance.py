"""Wave balance: which of two heights of tiles the waves of a call fit better, as one number that a table can split by.

A tall tile does the work of a call with fewer instructions for each row, but leaves more idle where it begins a wave
more: which kernel is fastest changes back and forth as the sizes grow, and neither a size nor a product of sizes parts
that in few buckets. Of cells of full attention in graphs on an H100 that were left out (2 of 4 folds) tables lose
0.0197 (log time) without it and 0.0086 with it, over all attention 0.0195 and 0.0180.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

# Rows of the tiles of attention kernels on Hopper: of FlashAttention-2, cuDNN and FlashAttention-4, and of the latter
# with head_dim 64 (flash_attn/cute/interface.py). Of cells of an H100 that were left out, what is expected to be
# fastest loses 0.0107 without 192 in place of 0.0094, and 0.0112 and 0.0120 with 64 or 256 beside them.
TILES: Final = (128, 192)
# The balance where both heights work off equally many rows one after the other.
EVEN: Final = 1024
# The bounds of all balances: tall tiles are at most as many as short ones, and at least half as many.
LEAST: Final = EVEN * TILES[1] // (2 * TILES[0])
MOST: Final = EVEN * TILES[1] // TILES[0]

_NAME = re.compile(r"wave_balance\((?:([1-9]\d*) \* )?(\w+), (\w+), ([1-9]\d*)\)")

Count = TypeVar("Count", int, NDArray[np.int64])
Axis = TypeVar("Axis", int, str)
_Axis = TypeVar("_Axis", int, str, contravariant=True)
_Value = TypeVar("_Value", covariant=True)


class ByAxis(Protocol[_Axis, _Value]):
    """Something of each axis: in their order, or by their names."""

    def __getitem__(self, axis: _Axis, /) -> _Value: ...


def waves_of(matrices: Count, rows: Count, tile_rows: int, multiprocessors: int) -> Count:
    """In how many waves so many multiprocessors work off the tiles of this height of some matrices."""
    return -(-matrices * -(-rows // tile_rows) // multiprocessors)


def balance_of(matrices: Count, rows: Count, multiprocessors: int) -> Count:
    """Rows that a multiprocessor works off one after the other in tall tiles, in `EVEN`-ths of those in short ones."""
    short, tall = (waves_of(matrices, rows, tile_rows, multiprocessors) for tile_rows in TILES)
    return MOST * tall // short


def balances_between(matrices: tuple[int, int], rows: tuple[int, int], multiprocessors: int) -> tuple[int, int]:
    """Bounds of the balance where there are so many matrices of so many rows, both inclusive: waves grow with either.
    Not all between them need occur; those of all calls where there are none."""
    if matrices[0] > matrices[1] or rows[0] > rows[1]:
        return LEAST, MOST
    short, tall = (
        [waves_of(*largest, tile_rows, multiprocessors) for largest in zip(matrices, rows, strict=True)]
        for tile_rows in TILES
    )
    return max(LEAST, MOST * tall[0] // short[1]), min(MOST, MOST * tall[1] // short[0])


@dataclass(frozen=True)
class WaveBalance(Generic[Axis]):
    """The balance of a static key's calls, of their sizes by axis: by its number, or by its name.

    Attributes:
        count: the axis that counts matrices.
        rows: the axis of the rows of each.
        each: how many matrices there are to one of the count.
        multiprocessors: of the device.
    """

    count: Axis
    rows: Axis
    each: int
    multiprocessors: int

    def of(self, sizes: ByAxis[Axis, int]) -> int:
        return balance_of(self.each * sizes[self.count], sizes[self.rows], self.multiprocessors)

    def of_all(self: WaveBalance[int], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of sizes (places, axes), those of each place."""
        return balance_of(self.each * sizes[:, self.count], sizes[:, self.rows], self.multiprocessors)

    def span(self, ranges: ByAxis[Axis, tuple[int, int]]) -> tuple[int, int]:
        """`balances_between` of sizes in these ranges."""
        least, most = ranges[self.count]
        return balances_between((self.each * least, self.each * most), ranges[self.rows], self.multiprocessors)

    def named(self: WaveBalance[int], axes: Sequence[str]) -> WaveBalance[str]:
        """The same by the names of all axes."""
        return WaveBalance(axes[self.count], axes[self.rows], self.each, self.multiprocessors)

    def condition(self: WaveBalance[str], edge: int) -> str:
        """That the balance is at most an edge, in the syntax of generated tables: the waves of both sides multiplied,
        so that nothing is divided by a size."""
        short, tall = (
            f"-(-{self._matrices} * -(-{self.rows} // {tile_rows}) // {self.multiprocessors})" for tile_rows in TILES
        )
        return f"{MOST} * {tall} < {edge + 1} * {short}"

    def __str__(self) -> str:
        """What evidence calls it."""
        return f"wave_balance({self._matrices}, {self.rows}, {self.multiprocessors})"

    @property
    def _matrices(self) -> str:
        return str(self.count) if self.each == 1 else f"{self.each} * {self.count}"


def parse_balance(text: str) -> WaveBalance[str] | None:
    """The inverse of `str` of a balance of named axes, None for another text."""
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    each, count, rows, multiprocessors = found.groups()
    return WaveBalance(count, rows, int(each or 1), int(multiprocessors))
