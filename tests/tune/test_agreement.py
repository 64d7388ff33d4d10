"""Agreement of two tables: the same plan, or plans that both take to be as good."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.judge import Choice
from layerzero_tune.evaluate.agreement import Tuning, agreement
from tests.tune.synthetic_results import norm

A, B, C = (("kernel.a", "{}"), ("kernel.b", "{}"), ("kernel.a", '{"block":64}'))
SHAPES = [norm(rows) for rows in range(1, 9)]


def tuning(picks: Mapping[SelectionContext, Choice], ties: Collection[frozenset[Choice]] = ()) -> Tuning:
    """A tuning that takes the plans of each group to be as good as each other."""

    def alike(context: SelectionContext, choice: Choice) -> set[Choice]:
        return {choice}.union(*(group for group in ties if choice in group))

    return Tuning(picks, alike)


def everywhere(choice: Choice) -> dict[SelectionContext, Choice]:
    return dict.fromkeys(SHAPES, choice)


def test_the_same_plan_agrees_whatever_the_ties() -> None:
    found = agreement(tuning(everywhere(A)), tuning(everywhere(A)), SHAPES)
    assert (found.shapes, found.same, found.tied, found.rest) == (8, 1.0, 1.0, ())


def test_another_configuration_is_another_plan() -> None:
    assert agreement(tuning(everywhere(A)), tuning(everywhere(C)), SHAPES).tied == 0.0


def test_a_tie_must_be_one_to_both() -> None:
    tied = [frozenset({A, B})]
    both = agreement(tuning(everywhere(A), tied), tuning(everywhere(B), tied), SHAPES)
    assert (both.same, both.tied) == (0.0, 1.0)
    for first, second in ((tied, []), ([], tied)):
        one = agreement(tuning(everywhere(A), first), tuning(everywhere(B), second), SHAPES)
        assert (one.same, one.tied, len(one.rest)) == (0.0, 0.0, 8)


def test_every_shape_counts_once_and_the_rest_is_named() -> None:
    picks = everywhere(A) | {SHAPES[2]: B, SHAPES[5]: C}
    tied = [frozenset({A, B})]
    found = agreement(tuning(everywhere(A), tied), tuning(picks, tied), SHAPES)
    assert (found.same, found.tied) == (6 / 8, 7 / 8)
    assert [(each.context, each.first, each.second) for each in found.rest] == [(SHAPES[5], A, C)]


@given(st.lists(st.tuples(*[st.sampled_from([A, B, C])] * 2), min_size=8, max_size=8), st.booleans())
def test_agreement_is_symmetric_and_ties_only_add_to_it(pairs: list[tuple[Choice, Choice]], ties: bool) -> None:
    groups = [frozenset({A, B})] if ties else []
    one, other = (tuning(dict(zip(SHAPES, side, strict=True)), groups) for side in zip(*pairs, strict=True))
    found, swapped = agreement(one, other, SHAPES), agreement(other, one, SHAPES)
    assert (found.same, found.tied) == (swapped.same, swapped.tied)
    assert found.same <= found.tied <= 1.0
    assert len(found.rest) == round((1.0 - found.tied) * 8)


def test_no_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="no shapes"):
        agreement(tuning({}), tuning({}), [])
