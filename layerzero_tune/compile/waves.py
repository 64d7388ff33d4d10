"""Waves: how far a GPU stands idle while it works off the last of a call's tiles.

A kernel cuts a call into tiles, and the multiprocessors take them in waves, one each: 133 tiles on 132 of them take as
long as 264. Kernels whose tiles differ in size jump at other sizes, so which is fastest changes with every wave (wave
quantization: NVIDIA, Matrix Multiplication Background User's Guide). Of 102 calls of full attention of an evaluation
on an H100, what is expected to be fastest loses 0.017 (log time) without this and 0.005 with it, and tables 0.017 and
0.014; of its cells that were left out (three times 755), 0.0128 and 0.0116, and 0.0142 and 0.0135.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.arrays import Floats

# Rows of the tiles of attention kernels on Hopper: of FlashAttention-2, cuDNN and FlashAttention-4, and of the latter
# with head_dim 64 (flash_attn/cute/interface.py). Of cells of an H100 that were left out, what is expected to be
# fastest loses 0.0107 without 192 in place of 0.0094, and 0.0112 and 0.0120 with 64 or 256 beside them.
TILES = (128, 192)


@dataclass(frozen=True)
class Waves:
    """What a GPU's kernels of an operation share out among its multiprocessors.

    Attributes:
        matrices: `Operation.matrices`.
        multiprocessors: how many work at once.
    """

    matrices: Callable[[SelectionContext, Sizes], tuple[int, int]]
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
            matrices, rows = self.matrices(context, sizes)
            found.append(self._idle(round(matrices * 2.0**octaves), rows))
        return np.array(found).reshape(-1, len(TILES))

    def _idle(self, matrices: int, rows: int) -> list[float]:
        found = []
        for tile_rows in TILES:
            tiles = matrices * -(-rows // tile_rows)
            waves = -(-tiles // self.multiprocessors)
            # Not numpy's logarithm, whose last bits depend on the machine.
            found.append(math.log2(waves * self.multiprocessors / max(tiles, self.multiprocessors)))
        return found
