"""The snapshot in force, where the fast paths read it: one attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerzero_runtime.snapshot import Snapshot


class Published:
    """Holds the snapshot in force, None before the first selection."""

    __slots__ = ("snapshot",)

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None


PUBLISHED = Published()
