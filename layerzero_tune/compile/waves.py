"""Waves: how far a GPU stands idle while it works off the last of a call's tiles.

A kernel cuts a call into tiles, and the multiprocessors take them in waves, one each: 133 tiles on 132 of them take as
long as 264. Kernels whose tiles differ in size jump at other sizes, so which is fastest changes with every wave (wave
quantization: NVIDIA, Matrix Multiplication Background User's Guide). Of 102 calls of full attention of an evaluation
on an H100, what is expected to be fastest loses 0.017 (log time) without this and 0.005 with it, and tables 0.017 and
0.014; of its cells that were left out (three times 755), 0.0128 and 0.0116, and 0.0142 and 0.0135.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operation import Matrices, Operation, Sizes
from layerzero_tune.compile.arrays import Floats
from layerzero_tune.compile.wave_balance import TILES, WaveBalance, waves_of


@dataclass(frozen=True)
class Waves:
    """What a GPU's kernels of an operation share out among its multiprocessors.

    Attributes:
        matrices: those of the operation.
        multiprocessors: how many work at once.
    """

    matrices: Matrices
    multiprocessors: int

    @classmethod
    def of(cls, operation: Operation, device: DeviceSpec) -> Self | None:
        """None where the calls are not cut into tiles, or it is not known how many work at once."""
        if operation.matrices is None or not device.multiprocessors:
            return None
        return cls(operation.matrices, device.multiprocessors)

    def idle(self, calls: Iterable[tuple[SelectionContext, Sizes]]) -> Floats:
        """By how many octaves a call takes longer, for each of `TILES`, than if its tiles filled all waves: (calls,
        tiles), from 0 to 1. A call of less than one wave counts as filling it: its sizes tell the rest."""
        return self.idle_beside((context, sizes, 0.0) for context, sizes in calls)

    def idle_beside(self, calls: Iterable[tuple[SelectionContext, Sizes, float]]) -> Floats:
        """The same of calls of keys beside that of the context: the number is the octaves by which these have more
        matrices, as those of a larger group of query heads do."""
        found = []
        for context, sizes, octaves in calls:
            count = sizes[self.matrices.count] * self.matrices.each(context)
            found.append(self._idle(round(count * 2.0**octaves), sizes[self.matrices.rows]))
        return np.array(found).reshape(-1, len(TILES))

    def balance(self, context: SelectionContext) -> WaveBalance[int]:
        """What trees of a static key may split by: the waves of its calls."""
        return WaveBalance(self.matrices.count, self.matrices.rows, self.matrices.each(context), self.multiprocessors)

    @property
    def tiles(self) -> Mapping[int, int]:
        """By axis, into how many rows each its sizes are cut at most often: a kernel spends the time of whole tiles,
        and often a mask more, on rows that do not fill them."""
        return {self.matrices.rows: TILES[0]}

    def _idle(self, matrices: int, rows: int) -> list[float]:
        found = []
        for tile_rows in TILES:
            tiles = matrices * -(-rows // tile_rows)
            waves = waves_of(matrices, rows, tile_rows, self.multiprocessors)
            # Not numpy's logarithm, whose last bits depend on the machine.
            found.append(math.log2(waves * self.multiprocessors / max(tiles, self.multiprocessors)))
        return found
