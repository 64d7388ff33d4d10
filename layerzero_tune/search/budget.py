"""A budget of time: how it is written, when it is spent, and how the measurement in flight is given up then."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from types import FrameType

from layerzero_runtime.errors import ContextError

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SHORTEST_ALARM_S = 1e-3


class BudgetSpentError(BaseException):
    """The budget ended in the middle of a measurement. Like Ctrl-C no `Exception`: nothing on the way may take it for a
    kernel's failure."""


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m` or `1h30m`.

    Raises:
        ContextError: the text is none, or no time at all.
    """
    found = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600.0 * hours + 60.0 * minutes + seconds
    if total <= 0.0:
        raise ContextError(f"--budget is {text!r}, required a time above 0 such as 90s, 10m or 1h30m")
    return total


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds until then, below 0 afterwards."""
        return self.at - monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise `BudgetSpentError` inside the block once the deadline has come.

        By an alarm signal, so that waiting for a worker ends as it does at Ctrl-C. In the main thread alone, and only
        where the system has alarms (not on Windows).

        Raises:
            BudgetSpentError: it came.
        """

        def give_up(number: int, frame: FrameType | None) -> None:
            raise BudgetSpentError

        before = signal.signal(signal.SIGALRM, give_up)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(_SHORTEST_ALARM_S, self.left_s()))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
