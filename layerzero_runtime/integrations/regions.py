"""The sizes for which a table's decision function gives one answer, as guards of the graph that is being traced.

Left to itself, Dynamo would guard on each comparison on the way to a leaf: a plan that several leaves have, or calls on
both sides of the measured range, would have as many graphs as there are ways to it, and Dynamo gives up after eight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch

_Symbolic = int | torch.SymInt
# Sizes are integers, so every comparison is that some number is not below zero. torch simplifies Boolean expressions to
# a normal form that grows exponentially; of these numbers the least is an "and", the greatest an "or".
_least: Callable[[Any, Any], _Symbolic] = torch.sym_min
_greatest: Callable[[Any, Any], _Symbolic] = torch.sym_max
_MARGINS: dict[Callable[[Any, Any], Any], Callable[[Any, Any], _Symbolic]] = {
    operator.le: lambda left, right: right - left,
    operator.lt: lambda left, right: right - left - 1,
    operator.ge: lambda left, right: left - right,
    operator.gt: lambda left, right: left - right - 1,
    operator.eq: lambda left, right: _least(left - right, right - left),
    operator.ne: lambda left, right: _greatest(left - right, right - left) - 1,
}


# Of each trace, the regions that it is kept to: the layers of a model ask for the same one again and again.
_guarded: WeakKeyDictionary[Any, set[tuple[object, ...]]] = WeakKeyDictionary()


def guard_region(decide: Callable[..., int], sizes: Sequence[_Symbolic], leaves: frozenset[int]) -> None:
    """Keep the graph that is being traced to the sizes for which the decision is one of these leaves.

    Raises:
        AssertionError: the traced call has other sizes.
    """
    sizes = [_known(size) for size in sizes]
    traces = [size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)]
    known = _guarded.setdefault(traces[0], set()) if traces else set()
    region = (decide, leaves, *map(str, sizes))
    if region in known:
        return
    part = _part(decide, sizes, leaves, ())
    # What all of the region's sizes have in common is a guard each: Dynamo learns the ranges of the sizes from them.
    while isinstance(part, _Comparison) and (part.yes is False or part.no is False):
        holds = bool(part.compare(part.left, part.right))
        part = part.yes if holds else part.no
    if part is False or (isinstance(part, _Comparison) and not _margin(part) >= 0):
        raise AssertionError("the traced call is outside of the region of its own plan")
    known.add(region)


def _known(size: _Symbolic) -> _Symbolic:
    """A number where other guards leave the size but one value: torch simplifies a least of greatest numbers wrongly
    where some are constants."""
    value = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if value is None else value


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A comparison of a decision function, and what follows from its outcomes: a region, or all sizes or none."""

    compare: Callable[[Any, Any], Any]
    left: _Symbolic
    right: _Symbolic
    yes: _Comparison | bool
    no: _Comparison | bool


def _margin(part: _Comparison) -> _Symbolic:
    """Not below zero for the sizes of the region, and only for them."""
    holds = _MARGINS[part.compare](part.left, part.right)
    fails = -holds - 1
    if isinstance(part.yes, _Comparison):
        yes = _margin(part.yes)
        if isinstance(part.no, _Comparison):
            return _greatest(_least(holds, yes), _least(fails, _margin(part.no)))
        return _greatest(fails, yes) if part.no else _least(holds, yes)
    if isinstance(part.no, _Comparison):
        no = _margin(part.no)
        return _greatest(holds, no) if part.yes else _least(fails, no)
    return holds if part.yes else fails


def _part(
    decide: Callable[..., int],
    sizes: Sequence[_Symbolic],
    leaves: frozenset[int],
    outcomes: tuple[bool, ...],
) -> _Comparison | bool:
    """The region below a node of the decision: the comparisons on the way to it had these outcomes."""
    pending = list(reversed(outcomes))

    def outcome(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> bool:
        if pending:
            return pending.pop()
        raise _OpenError(compare, left, right)

    try:
        leaf = decide(*(_Size(size, outcome) if isinstance(size, torch.SymInt) else size for size in sizes))
        return leaf in leaves
    except _OpenError as node:
        yes = _part(decide, sizes, leaves, (*outcomes, True))
        no = _part(decide, sizes, leaves, (*outcomes, False))
        # Where both outcomes lead to all sizes or to none, the comparison decides nothing.
        return yes if yes is no else _Comparison(node.compare, node.left, node.right, yes, no)


class _OpenError(Exception):
    """A comparison whose outcome is not given: the next node of the decision."""

    def __init__(self, compare: Callable[[Any, Any], Any], left: Any, right: Any) -> None:
        super().__init__()
        self.compare, self.left, self.right = compare, left, right


class _Size:
    """Stands for a symbolic size in a decision function, which compares operands of sizes and integers, made by `*`,
    unary `-` and `//` (`tables.table_syntax`)."""

    __slots__ = ("_outcome", "value")

    def __init__(self, value: _Symbolic, outcome: Callable[..., bool]) -> None:
        self.value = value
        self._outcome = outcome

    def _compared(self, compare: Callable[[Any, Any], Any], other: Any) -> bool:
        return self._outcome(compare, self.value, other.value if isinstance(other, _Size) else other)

    def __mul__(self, other: Any) -> _Size:
        return _Size(self.value * (other.value if isinstance(other, _Size) else other), self._outcome)

    __rmul__ = __mul__

    def __neg__(self) -> _Size:
        return _Size(-self.value, self._outcome)

    def __floordiv__(self, divisor: int) -> _Size:
        return _Size(self.value // divisor, self._outcome)

    def __lt__(self, other: Any) -> bool:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> bool:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> bool:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> bool:
        return self._compared(operator.ge, other)

    def __eq__(self, other: object) -> bool:
        return self._compared(operator.eq, other)

    def __ne__(self, other: object) -> bool:
        return self._compared(operator.ne, other)

    def __hash__(self) -> NoReturn:
        raise TypeError("a symbolic size has no hash")
