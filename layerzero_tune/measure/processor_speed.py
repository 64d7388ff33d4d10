"""How fast the processors are now, by a small loop: a virtual machine's change with its neighbours, and no counter of
the system tells.

How well the cores work together: they may be moved apart for minutes, and back. On a virtual machine with 2 cores of an
EPYC, PyTorch's parallel loops then took 1.3 times as long, those that share their data up to 5 times, and serial ones
the same. Kernels differ in how many such loops they have, so that their ratios are of another machine.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from time import monotonic, perf_counter_ns, sleep

# What may be missing from the best speed: on the machine above the speed varied by 3% around its best, and by 1% around
# 0.76 of it while the cores were apart.
MAX_LOSS = 0.12
# Where the speed stays low for so long, it is the machine's own.
WINDOW_S = 1200.0
# Elements per thread: torch's own grain (at::internal::GRAIN_SIZE), below which loops are serial.
_GRAIN = 32768
_BLOCKS, _CALLS = 9, 50


class ProcessorSpeed:
    """The time of a small loop, against its best of the last `WINDOW_S`.

    `measure` gives the loop's time in any unit, `now` the time in s.

    Attributes:
        max_loss: the share that may be missing from the best.
        last: the time at the last look.
    """

    is_of_processors = True
    look_s = 0.25
    max_loss = MAX_LOSS

    def __init__(self, measure: Callable[[], float], now: Callable[[], float] = monotonic) -> None:
        self.last = 0.0
        self._measure = measure
        self._now = now
        # When which time was seen, each shorter than all that were seen after it.
        self._seen: deque[tuple[float, float]] = deque()

    def lost(self) -> float:
        """The share of the best speed that is missing now, 0 if that is no more than usual."""
        now, time = self._now(), self._measure()
        self.last = time
        while self._seen and self._seen[-1][1] >= time:
            self._seen.pop()
        self._seen.append((now, time))
        while self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()
        best = self._seen[0][1]
        lost = 1.0 - best / time
        return lost if lost > self.max_loss else 0.0

    def is_of_load(self) -> bool:
        return False

    def pause(self) -> None:
        sleep(self.look_s)


def parallel_loop() -> Callable[[], float]:
    """A loop on all of torch's threads; the function gives the time of a call in ns, in a few ms."""
    import torch

    return additions(_GRAIN * torch.get_num_threads(), _CALLS, _BLOCKS)


def additions(elements: int, calls: int, blocks: int) -> Callable[[], float]:
    """The time of one of torch's additions of so many elements on the CPU, in ns: the median of blocks of calls, under
    `inference_mode` as contests are (a sixth of a short call's time)."""
    import torch

    first, second, total = torch.rand(elements), torch.rand(elements), torch.empty(elements)

    def block() -> float:
        start = perf_counter_ns()
        for _ in range(calls):
            torch.add(first, second, out=total)
        return (perf_counter_ns() - start) / calls

    def loop() -> float:
        with torch.inference_mode():
            return statistics.median(block() for _ in range(blocks))

    return loop
