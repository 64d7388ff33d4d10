"""Agreement of two tables: whether two tunings of one device tell their users the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.judge import Choice

# A plan ties with a table's own pick where the table's regret model puts it within 2% of that.
TIE_WITHIN = 0.02

Alike = Callable[[SelectionContext, Choice], Collection[Choice]]
"""The plans that a table takes to be within `TIE_WITHIN` of one plan on a shape."""


@dataclass(frozen=True)
class Tuning:
    """What one table picks on each shape, the live selector's plan on a miss, and what it takes to be as good."""

    picks: Mapping[SelectionContext, Choice]
    alike: Alike


@dataclass(frozen=True)
class Disagreement:
    """A shape on which a table's pick is not among those that the other takes to be as good as its own."""

    context: SelectionContext
    first: Choice
    second: Choice


@dataclass(frozen=True)
class Agreement:
    """Shares of the shapes, each of which counts once.

    Attributes:
        same: both tables pick the same plan.
        tied: the same, or each pick lies in the other's tie set.
        rest: the shapes that are neither, in their order.
    """

    shapes: int
    same: float
    tied: float
    rest: tuple[Disagreement, ...]


def agreement(first: Tuning, second: Tuning, contexts: Sequence[SelectionContext]) -> Agreement:
    """How far two tunings agree on held-out shapes.

    Raises:
        ValueError: no shapes.
    """
    if not contexts:
        raise ValueError("no shapes, an agreement needs at least one")
    differing = [context for context in contexts if first.picks[context] != second.picks[context]]
    rest = tuple(
        Disagreement(context, one, other)
        for context in differing
        for one, other in ((first.picks[context], second.picks[context]),)
        if one not in second.alike(context, other) or other not in first.alike(context, one)
    )
    count = len(contexts)
    return Agreement(count, (count - len(differing)) / count, (count - len(rest)) / count, rest)
