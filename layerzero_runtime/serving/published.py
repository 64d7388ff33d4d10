"""The snapshot in force, where the public functions read it: one attribute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerzero_runtime.serving.seen_calls import SeenCalls
    from layerzero_runtime.snapshot import Snapshot


class Published:
    """Holds the snapshot in force.

    Attributes:
        snapshot: None before the first selection.
        eager: what was seen under it, while no thread is in graph mode and no graph is being captured, else None: what
            the public functions read, so that one look tells them whether they may serve by themselves.
        followers: are called with each snapshot that is published.
    """

    __slots__ = ("_lock", "_special", "eager", "followers", "snapshot")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._special = 0
        self.snapshot: Snapshot | None = None
        self.eager: SeenCalls | None = None
        self.followers: tuple[Callable[[Snapshot], None], ...] = ()

    @property
    def special(self) -> int:
        """Number of graph-mode blocks and captures under way in this process."""
        return self._special

    def publish(self, snapshot: Snapshot | None) -> None:
        with self._lock:
            self.snapshot = snapshot
            self.eager = None if self._special or snapshot is None else snapshot.seen
        if snapshot is not None:
            for follow in self.followers:
                follow(snapshot)

    def enter_special(self) -> None:
        with self._lock:
            self._special += 1
            self.eager = None

    def leave_special(self) -> None:
        with self._lock:
            self._special -= 1
            self.eager = None if self._special or self.snapshot is None else self.snapshot.seen


PUBLISHED = Published()
