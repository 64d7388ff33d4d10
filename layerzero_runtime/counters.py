"""Counters that threads may raise without a lock, and log lines that appear once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
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

    def counter(self, name: str) -> Counter:
        """The counter of that name."""
        counter = self._counters.get(name)
        if counter is None:
            # setdefault is atomic: of two threads that both make one, one wins and both use it.
            counter = self._counters.setdefault(name, Counter())
        return counter

    def raise_by_one(self, name: str) -> int:
        """Raise the counter of that name; returns its value before."""
        return self.counter(name).raise_by_one()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, counter.value) for name, counter in sorted(self._counters.items()))


class CallCounters:
    """Calls and misses of a process by route, kept over its snapshots: what they count never falls."""

    __slots__ = ("_by_route", "_max_routes", "_others")

    def __init__(self, max_routes: int) -> None:
        self._max_routes = max_routes
        self._by_route: dict[Hashable, tuple[Counter, Counter]] = {}
        # Of all routes beyond the bound.
        self._others = Counter(), Counter()

    def of(self, route: Hashable) -> tuple[Counter, Counter]:
        """(calls, misses) of a route."""
        found = self._by_route.get(route)
        if found is None:
            if len(self._by_route) >= self._max_routes:
                return self._others
            # Of two threads that both make them, one wins and both use those.
            found = self._by_route.setdefault(route, (Counter(), Counter()))
        return found

    def total(self) -> tuple[int, int]:
        """(calls, misses) so far."""
        counters = (*tuple(self._by_route.values()), self._others)
        # Misses first: a call is counted before its miss, so that the two stay in order while other threads count.
        misses = sum(missed.value for _, missed in counters)
        return sum(calls.value for calls, _ in counters), misses


def log_warning(message: str) -> None:
    """One line to the logger "layerzero"; logging is imported when it is first needed."""
    import logging

    logging.getLogger("layerzero").warning(message)
