"""The live selector's answers, kept for the life of a snapshot: hits take no lock, identical misses compute once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from layerzero_runtime.counters import Counter

# Classes of contexts are few: with all features of an operation at their usual values a few dozen an operation.
MAX_ENTRIES = 8192

_Answer = TypeVar("_Answer")


class _Computation:
    """One thread computes, the others wait for it."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None


class LiveCache(Generic[_Answer]):
    """Answers by key, at most `max_entries`; beyond that the oldest goes.

    Raises:
        ValueError: `max_entries` is below 1.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}, required at least 1; a cache cannot be turned off")
        self._max_entries = max_entries
        # Not a plain dictionary: there the oldest of n lies behind the gaps that up to n others have left.
        self._answers: OrderedDict[Hashable, _Answer] = OrderedDict()
        self._computing: dict[Hashable, _Computation] = {}
        self._lock = threading.Lock()
        self.hits, self.computed = Counter(), Counter()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Hashable, compute: Callable[[], _Answer]) -> tuple[_Answer, bool]:
        """(the answer, whether it was there already). Of threads that ask for one key at once, one computes.

        Whatever `compute` raises is raised in each of them, and is not kept.
        """
        while True:
            # One read: an answer cannot be None.
            answer = self._answers.get(key)
            if answer is not None:
                self.hits.raise_by_one()
                return answer, True
            with self._lock:
                waiting = self._computing.get(key)
                if waiting is None and key not in self._answers:
                    mine = self._computing[key] = _Computation()
                    break
            if waiting is not None:
                waiting.done.wait()
                if waiting.error is not None:
                    raise waiting.error
        try:
            answer = compute()
            self.computed.raise_by_one()
            with self._lock:
                while len(self._answers) >= self._max_entries:
                    self._answers.popitem(last=False)
                self._answers[key] = answer
        except BaseException as error:
            mine.error = error
            raise
        finally:
            with self._lock:
                del self._computing[key]
            mine.done.set()
        return answer, False
