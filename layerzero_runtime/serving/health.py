"""Health: one circuit breaker per kernel that failed; when it may be tried again, and whether that went well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from layerzero_runtime import ranks

FIRST_PAUSE_S = 30.0
# Doubled at every further failure, up to this.
LONGEST_PAUSE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """A kernel that failed.

    Attributes:
        failures: in a row.
        reason: what the last one said.
        since_s, until_s: by the clock of `Health`; from `until_s` on one call probes whether the kernel works again.
    """

    kernel_id: str
    failures: int
    reason: str
    since_s: float
    until_s: float
    half_open: bool = False


class Health:
    """The breakers of a process. `on_change` is called, without a lock, after the set of broken kernels has changed.

    A timer runs only while a kernel is broken.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()
        self._breakers: dict[str, Breaker] = {}
        self._probing: set[str] = set()
        self._timer: threading.Timer | None = None

    @property
    def broken(self) -> dict[str, Breaker]:
        """The kernels that serve no call now, with their breakers."""
        with self._lock:
            return {name: breaker for name, breaker in self._breakers.items() if not breaker.half_open}

    @property
    def half_open(self) -> frozenset[str]:
        """The kernels of which one call at a time finds out whether they work again."""
        with self._lock:
            return frozenset(name for name, breaker in self._breakers.items() if breaker.half_open)

    def failed(self, kernel_id: str, reason: str) -> None:
        """Open the breaker of a kernel, or keep it open for twice as long after a failed probe."""
        with self._lock:
            before = self._breakers.get(kernel_id)
            self._probing.discard(kernel_id)
            if before is not None and not before.half_open:
                return  # another thread's call failed as well: one breaker, one pause
            failures = 1 if before is None else before.failures + 1
            pause = min(self._first_pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
            now = self._clock()
            self._breakers[kernel_id] = Breaker(kernel_id, failures, reason, now, now + pause)
            self._arm()
        self._on_change()

    def begin_probe(self, kernel_id: str) -> bool:
        """Whether this call may try a half-open kernel: one at a time does."""
        with self._lock:
            breaker = self._breakers.get(kernel_id)
            if breaker is None:
                return True
            if not breaker.half_open or kernel_id in self._probing:
                return False
            self._probing.add(kernel_id)
            return True

    def end_probe(self, kernel_id: str) -> None:
        """The call that tried a half-open kernel is over; where it found out nothing, another may try."""
        with self._lock:
            self._probing.discard(kernel_id)

    def forget(self, kernel_id: str) -> None:
        """A kernel of this name is no more: another one under it begins without failures. The caller publishes."""
        with self._lock:
            self._breakers.pop(kernel_id, None)
            self._probing.discard(kernel_id)

    def succeeded(self, kernel_id: str) -> None:
        """Close the breaker after a probe that went well."""
        with self._lock:
            self._probing.discard(kernel_id)
            closed = self._breakers.pop(kernel_id, None)
        if closed is not None:
            self._on_change()

    def reopen_due(self) -> None:
        """Make the breakers whose pause is over half-open; the timer calls this. With ranks attached nothing happens: a
        probe on one rank alone would change what that rank selects. `distributed.detach` calls this again."""
        if ranks.attached():
            return
        with self._lock:
            now = self._clock()
            due = [breaker for breaker in self._breakers.values() if not breaker.half_open and breaker.until_s <= now]
            self._breakers.update({breaker.kernel_id: replace(breaker, half_open=True) for breaker in due})
            self._arm()
        if due:
            self._on_change()

    def reset(self) -> None:
        """Forget all failures."""
        with self._lock:
            had = bool(self._breakers)
            self._breakers.clear()
            self._probing.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        if had:
            self._on_change()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [breaker.until_s for breaker in self._breakers.values() if not breaker.half_open]
        if not waiting:
            return
        self._timer = threading.Timer(max(0.0, min(waiting) - self._clock()), self.reopen_due)
        self._timer.daemon = True
        self._timer.start()
