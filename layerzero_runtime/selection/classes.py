"""Classes of contexts: what the checks of an operation's kernels and rules can tell apart, and nothing finer.

A cache keyed by raw sizes would miss at every step of a decode loop. The class of a context says of each field that a
check reads on which side of every threshold it lies; two contexts of one class get the same answer from every check.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.selection.limits import Limit

_OTHER = ("other",)  # equal to no value of a field


class ContextClasses:
    """The classes that a collection of limits makes."""

    __slots__ = ("_readers", "fields")

    def __init__(self, limits: Iterable[Limit]) -> None:
        by_field: dict[str, set[Limit]] = {}
        for limit in limits:
            by_field.setdefault(limit.field, set()).add(limit)
        self.fields = tuple(sorted(by_field))
        self._readers = tuple((field, _classifier(by_field[field])) for field in self.fields)

    def of(self, context: SelectionContext) -> tuple[Hashable, ...]:
        """The class: equal for contexts that every limit accepts or refuses alike."""
        return tuple([classify(getattr(context, field)) for field, classify in self._readers])


def _classifier(limits: Iterable[Limit]) -> Callable[[Any], Hashable]:
    lows = sorted({limit.bound for limit in limits if limit.kind == "at_least"})
    highs = sorted({limit.bound for limit in limits if limit.kind == "at_most"})
    divisors = sorted({limit.bound for limit in limits if limit.kind == "multiple_of"})
    listed = frozenset(value for limit in limits if limit.kind == "one_of" for value in limit.bound)
    if not (lows or highs or divisors):
        # A lone field of few values is its own class.
        return lambda value: value if value in listed else _OTHER

    def classify(value: Any) -> Hashable:
        if value is None:
            return None
        return (
            bisect_right(lows, value),
            # The values above a maximum begin behind it.
            sum(value > high for high in highs),
            tuple(value % divisor == 0 for divisor in divisors),
            value if value in listed else _OTHER,
        )

    return classify
