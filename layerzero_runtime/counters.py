"""Counters that threads may raise without a lock, and log lines that appear once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count


class Counter:
    """A monotonic counter: `next` on an `itertools.count` is one C call, atomic under the GIL, and loses no update."""

    __slots__ = ("_count", "raise_by_one")

    def __init__(self) -> None:
        self._count = count()
        self.raise_by_one = self._count.__next__

    @property
    def value(self) -> int:
        # repr is "count(5)": the one way to read it without raising it.
        return int(repr(self._count)[6:-1])


class CounterGroup:
    """Counters by name, created when first raised."""

    __slots__ = ("_counters",)

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}

    def raise_by_one(self, name: str) -> int:
        """Raise the counter of that name; returns its value before."""
        counter = self._counters.get(name)
        if counter is None:
            # setdefault is atomic: of two threads that both make one, one wins and both use it.
            counter = self._counters.setdefault(name, Counter())
        return counter.raise_by_one()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, counter.value) for name, counter in sorted(self._counters.items()))


def log_warning(message: str) -> None:
    """One line to the logger "layerzero"; logging is imported when it is first needed."""
    import logging

    logging.getLogger("layerzero").warning(message)
