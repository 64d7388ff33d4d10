"""Chains of choices: what serves calls that guards turn away, and what that is worth."""

from __future__ import annotations

import numpy as np

from layerzero_tune.compile.chains import Chains

# Choices 0 and 2 take all calls, 1 turns some away: the chains are 0, 2, 1 before 0 and 1 before 2.
CHAINS = Chains.of([False, True, False])


def test_a_choice_that_turns_calls_away_has_each_of_the_others_behind_it() -> None:
    assert CHAINS.heads.tolist() == [0, 2, 1, 1]
    assert CHAINS.behinds.tolist() == [0, 2, 0, 2]


def test_choices_serve_alone_where_none_of_them_takes_all_calls() -> None:
    chains = Chains.of([True, True])
    assert chains.heads.tolist() == chains.behinds.tolist() == [0, 1]


def test_a_chain_is_worth_what_its_parts_are_by_their_shares_of_the_calls() -> None:
    values = np.array([[0.0, -0.4, 0.2], [0.0, -0.4, np.nan], [0.0, np.nan, 0.2]])
    shares = np.array([[1.0, 0.75, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    expected = [[0.0, 0.2, -0.3, -0.25], [0.0, np.nan, -0.4, -0.4], [0.0, 0.2, 0.0, 0.2]]
    np.testing.assert_allclose(CHAINS.mixed(values, shares), expected)


def test_something_holds_of_a_chain_where_it_does_of_all_that_serve_calls() -> None:
    holds = np.array([[True, True, False]] * 3)
    shares = np.array([[1.0, 0.5, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    expected = [[True, False, True, False], [True, False, True, True], [True, False, True, False]]
    assert CHAINS.all_of(holds, shares).tolist() == expected


def test_the_larger_value_of_what_serves_a_part_of_the_calls_each() -> None:
    assert CHAINS.largest(np.array([[0.0, 0.3, 0.1]])).tolist() == [[0.0, 0.1, 0.3, 0.3]]
    assert CHAINS.largest(np.array([[0.2, 0.1, 0.0]])).tolist() == [[0.2, 0.0, 0.2, 0.1]]


def test_where_sizes_turn_the_first_away_the_second_serves_and_nothing_where_it_is_illegal() -> None:
    # At the first place all serve, at the second the default 0 stands in for 1, at the third 1 is illegal.
    serves = np.array([[0, 1, 2], [0, 0, 2], [0, -1, 2]])
    assert CHAINS.serving(serves).tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, -1, -1]]
