"""The processes that a process has started, and these in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def processes_below(root: int) -> Iterator[int]:
    """The ids of all processes below one, each before those that it has started itself; none where the system does not
    tell (proc(5), /proc/PID/task/TID/children). Whom one has started is asked for after it was given out."""
    for listed in Path(f"/proc/{root}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            for child in map(int, listed.read_text().split()):
                yield child
                yield from processes_below(child)
