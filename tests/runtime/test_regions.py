"""The guards that keep a graph to the region of its plan hold for the sizes of that region, and for no others."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import LocalSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from layerzero_runtime.integrations.regions import guard_region

Sizes = tuple[int, ...]
COMPARISONS = (operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne)
# Of three sizes, what a decision compares: one of them, a product of all, or how many waves tiles take.
OPERANDS: tuple[Callable[..., Any], ...] = (
    lambda batch, rows, columns: batch,
    lambda batch, rows, columns: rows,
    lambda batch, rows, columns: columns,
    lambda batch, rows, columns: batch * rows * columns,
    lambda batch, rows, columns: 3 * -(-batch * -(-rows // 6) // 5),
)
# Dynamo keeps sizes from 2 on symbolic.
POINTS = st.tuples(*[st.integers(2, 40)] * 3)


def _waves(batch: Any, rows: Any, columns: Any) -> Any:
    """Of shorter tiles than those in `OPERANDS`."""
    return 2 * -(-batch * -(-rows // 4) // 5)


def _constant(value: int) -> Callable[..., int]:
    return lambda *sizes: value


@st.composite
def decisions(draw: st.DrawFn, depth: int = 4) -> Callable[..., int]:
    """A decision function of three sizes with leaves -1 to 3, each of which may be reached in several ways."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        leaf = draw(st.integers(-1, 3))
        return lambda *sizes: leaf
    compare, operand = draw(st.sampled_from(COMPARISONS)), draw(st.sampled_from(OPERANDS))
    bound = draw(st.integers(3, 30).map(_constant) | st.just(_waves))
    yes, no = draw(decisions(depth - 1)), draw(decisions(depth - 1))
    return lambda *sizes: (yes if compare(operand(*sizes), bound(*sizes)) else no)(*sizes)


def symbolic(point: Sizes) -> tuple[ShapeEnv, list[torch.SymInt]]:
    """(what keeps the guards, the sizes of a call: equal ones have one symbol)."""
    shapes, sizes = ShapeEnv(), []
    for place, size in enumerate(point):
        source = LocalSource(f"size_{place}")
        symbol = shapes.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
        made = shapes.create_symintnode(symbol, hint=size, source=source)
        assert isinstance(made, torch.SymInt)
        sizes.append(made)
    return shapes, sizes


def passing(shapes: ShapeEnv, sizes: list[torch.SymInt]) -> Callable[[Sizes], bool]:
    """Whether all guards let given sizes pass: by the code that torch makes of them.

    Values put into their expressions one by one would not do: torch 2.13 simplifies what is half a number wrongly, such
    as Min(0, Max(-2, Min(1, Max(-19, Min(-10, 5*x))))) for a positive x, which is -2, to 0.
    """
    code = shapes.produce_guards_expression(sizes)
    return lambda point: code is None or shapes.evaluate_guards_expression(code, point)


@settings(max_examples=60, deadline=None)
@given(decide=decisions(), point=POINTS, others=st.lists(POINTS, max_size=40), also=st.sets(st.integers(-1, 3)))
def test_guards_hold_exactly_in_the_region(
    decide: Callable[..., int], point: Sizes, others: list[Sizes], also: set[int]
) -> None:
    leaves = frozenset({decide(*point), *also})
    shapes, sizes = symbolic(point)
    guard_region(decide, sizes, leaves)
    passes = passing(shapes, sizes)
    for other in (point, *others):
        # Sizes that are equal in the traced call are so in all calls of its graph.
        alike = tuple(dict(zip(point, other, strict=True))[size] for size in point)
        assert passes(alike) == (decide(*alike) in leaves)


@pytest.mark.parametrize("leaf", [0, 1])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_every_comparison_is_exact_at_its_bound(compare: Callable[..., Any], leaf: int) -> None:
    """Random sizes seldom meet a bound."""

    def decide(rows: int, columns: int) -> int:
        return int(compare(rows, 7)) if columns <= 20 else int(compare(rows, 12))

    points = [(rows, columns) for rows in range(2, 16) for columns in (20, 21)]
    shapes, sizes = symbolic(next(point for point in points if decide(*point) == leaf))
    guard_region(decide, sizes, frozenset({leaf}))
    passes = passing(shapes, sizes)
    assert [point for point in points if passes(point)] == [point for point in points if decide(*point) == leaf]


def test_sizes_that_other_guards_fix_are_numbers() -> None:
    """As constants in an expression of least and greatest sizes torch simplifies them wrongly: no guard was left."""

    def decide(batch: int, rows: int, columns: int) -> int:
        if rows <= 17:
            if batch > 9:
                return -1
            if batch > 19:
                return 0
            return -1 if rows <= 6 else 1
        return 0 if columns <= 11 else -1

    shapes, sizes = symbolic((23, 16, 18))
    assert sizes[1] == 16
    assert sizes[2] == 18
    guard_region(decide, sizes, frozenset({-1}))
    passes = passing(shapes, sizes)
    assert [batch for batch in range(2, 40) if passes((batch, 16, 18))] == [*range(10, 40)]
    assert not passes((23, 15, 18))


def test_a_search_over_edges_is_a_decision_too() -> None:
    edges, results = (4, 9, 20), (0, 1, 0, 2)

    def decide(rows: int) -> int:
        return results[bisect_left(edges, rows)]

    shapes, sizes = symbolic((15,))
    guard_region(decide, sizes, frozenset({0}))
    passes = passing(shapes, sizes)
    assert [rows for rows in range(2, 30) if passes((rows,))] == [2, 3, 4, *range(10, 21)]


def test_what_is_common_to_a_region_is_a_guard_each() -> None:
    """So that Dynamo learns the range of each size."""

    def decide(batch: int, rows: int) -> int:
        if not (4 <= batch <= 16 and rows <= 64):
            return -1
        if rows <= 8:
            return 0
        return 1 if rows <= 16 else 0

    shapes, sizes = symbolic((5, 20))
    guard_region(decide, sizes, frozenset({0}))
    assert len(shapes.guards) == 4
    guard_region(decide, sizes, frozenset({0}))
    assert len(shapes.guards) == 4


def test_sizes_outside_of_the_region_are_an_error() -> None:
    _, sizes = symbolic((5,))
    with pytest.raises(AssertionError, match="outside of the region"):
        guard_region(lambda rows: 0 if rows <= 4 else 1, sizes, frozenset({0}))
