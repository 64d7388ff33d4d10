"""Measuring at full speed: what was timed while the device was slowed down is timed again, unless it is what slows the
device down."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, TypeVar

from layerzero_runtime.errors import ContextError
from layerzero_tune.measure.contention import MAX_SHARE, ProcessorTime, others_share

# How long a contest waits for the speed to come back: that of a virtual machine's cores did so in seconds, or after
# minutes.
PATIENCE_S = 10.0
# Gives other seconds, 0 among them: where only what a run does counts, as in a test of it, waiting for the cores of a
# shared machine would take most of its time.
PATIENCE_VARIABLE = "LAYERZERO_PATIENCE"
# A part that finds the device at full speed so often, and each time leaves it at the limit of its power, is what takes
# the speed: calls of 14 ms and more draw an H100's 700 W within the call. They cannot be timed at full speed, and who
# serves them meets their times. Without such a limit, contests of attention spent all their patience on it, a quarter
# of the time of an H100's tuning, and were discarded.
_OWN_LOADS = 3

Part = TypeVar("Part")


class Speed(Protocol):
    """The speed of a device.

    Attributes:
        is_of_processors: whether other processes that use this machine's processors can take it.
        look_s: how often to look whether it is back, the length of a pause.
    """

    is_of_processors: bool
    look_s: float

    def lost(self) -> float:
        """The share of the speed that is missing now, 0 if that is no more than usual."""

    def is_of_load(self) -> bool:
        """Whether what was missing at the last look is missing for the power that the device draws."""

    def pause(self) -> None:
        """Let the time between two looks pass, and do what may bring the speed back."""


@dataclass
class Patience:
    """How long each contest of a device waits for its speed: half as long after each that waited in vain, until the
    speed is back. A virtual machine whose cores stayed apart had a run wait most of its time.

    Attributes:
        in_vain: how many contests have waited in vain since the speed was last seen.
    """

    in_vain: int = 0

    @property
    def seconds(self) -> float:
        """Of the next contest.

        Raises:
            ContextError: `PATIENCE_VARIABLE` is no number of seconds.
        """
        return _longest_s() * 0.5**self.in_vain


def _longest_s() -> float:
    text = os.environ.get(PATIENCE_VARIABLE, "").strip()
    try:
        seconds = float(text or PATIENCE_S)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < math.inf:
        raise ContextError(f"{PATIENCE_VARIABLE} is {text!r}, required a number of seconds such as 0.5 or 0")
    return seconds


class FullSpeed:
    """Takes the parts of one contest while its device is at full speed, with the patience that it has left.

    Attributes:
        lost: the largest share of the speed that was missing in a part that was kept, because the contest had no
            patience left; 0 where there is none.
        is_own_load: whether the contest's own calls hold the device at the limit of its power. What that limit alone
            takes does not count as lost then, and is not taken again.
        waited_s: how long it has waited.

    Args:
        waiting: is called before each pause.
        waited_in_parts_s: how long the parts have waited for something else, which costs no patience.
    """

    def __init__(
        self,
        speed: Speed,
        waiting: Callable[[], None],
        patience: Patience,
        waited_in_parts_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.lost = 0.0
        self.is_own_load = False
        self.waited_s = 0.0
        self._waited_in_parts_s = waited_in_parts_s
        self._speed = speed
        self._waiting = waiting
        self._patience = patience
        self._patience_s = patience.seconds
        self._is_full = False  # at the last look
        self._was_full = False  # at any

    def wait(self) -> None:
        """Wait for the speed, as long as the patience lasts, unless other processes are what takes it."""
        while self._patience_s > 0.0:
            self._look()
            if self._is_full:
                return
            self._waiting()
            self._patience_s -= self._speed.look_s
            if self._pause() > MAX_SHARE:
                self._patience_s = 0.0
                return
        self._patience.in_vain += not self._was_full

    def _pause(self) -> float:
        """The share of the processors that others took meanwhile, where it is they that can take the speed."""
        began = perf_counter()
        start = ProcessorTime.now() if self._speed.is_of_processors else None
        self._speed.pause()
        share = 0.0 if start is None else others_share(start, ProcessorTime.now())
        self.waited_s += perf_counter() - began
        return share

    def _look(self) -> float:
        """The share of the speed that is missing now."""
        lost = self._speed.lost()
        self._is_full = not lost
        if self._is_full:
            self._was_full = True
            self._patience.in_vain = 0
        return lost

    def take(self, part: Callable[[], Part]) -> Part:
        """What the part gives, taken again where the speed was lost meanwhile, as long as the patience lasts and unless
        the contest is what takes it. A part that gives None has failed, and is not taken again."""
        own_loads = 0
        while True:
            start, waited_s = perf_counter(), self._waited_in_parts_s()
            found = part()
            if found is None:
                return found
            taken_s = perf_counter() - start - (self._waited_in_parts_s() - waited_s)
            was_full, lost = self._is_full, self._look()
            if not lost:
                return found
            is_of_load = self._speed.is_of_load()
            own_loads = own_loads + was_full if is_of_load else 0
            self.is_own_load |= own_loads == _OWN_LOADS
            if is_of_load and self.is_own_load:
                return found
            if self._patience_s <= 0.0:
                self.lost = max(self.lost, lost)
                return found
            # A long part has to be seen as often as a short one.
            self._patience_s -= self._speed.look_s if is_of_load else max(taken_s, self._speed.look_s)
            self.wait()
