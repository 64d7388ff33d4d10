"""Few configurations in place of many, at no more than 1% for any cell."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.compile.portfolio import MAX_LOSS, narrow
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import ALL_KERNELS, configured, contest_rows, norm

DEFAULT: Choice = ("torch.rms_norm", "{}")
FREE: Choice = ("synthetic.wide", "{}")


def block(size: int) -> Choice:
    return ("synthetic.lean", json.dumps({"block": size}, separators=(",", ":")))


def cell(
    losses: Mapping[Choice, float],
    acceptable: Sequence[Choice] | None = None,
    unproved: Sequence[Choice] = (),
    default_ratio: float | None = 1.0,
) -> Verdict:
    """A cell in which the best choice takes half of the default's time; `losses` say how much slower others are."""
    standings = {
        choice: Standing(ratio, ratio - 0.001, 0.1 if choice in unproved else ratio + 0.001, 10)
        for choice, loss in losses.items()
        for ratio in (math.log(0.5 * (1.0 + loss)),)
    }
    if default_ratio is not None:
        standings[DEFAULT] = Standing(0.0, 0.0, 0.0, 10)
    best = min(standings, key=lambda choice: (standings[choice].log_ratio, choice))
    accepted = frozenset([best] if acceptable is None else acceptable)
    return Verdict(
        norm(1), (1, 1024), standings, DEFAULT, best if default_ratio is None else DEFAULT, best, accepted, accepted,
        1000.0, "2026-03-01T00:00:00+00:00",
    )  # fmt: skip


def serving(verdicts: Sequence[Verdict]) -> set[Choice]:
    return {choice for verdict in verdicts for choice in verdict.acceptable}


def test_one_configuration_that_is_nearly_the_best_everywhere_takes_the_place_of_all() -> None:
    """Although it is the best nowhere."""
    cells = [cell({block(size): 0.0, block(7): 0.008, block(8): 0.02}) for size in range(6)]
    assert serving(cells) == {block(size) for size in range(6)}
    assert serving(narrow(cells)) == {block(7)}


def test_the_smallest_cover_is_found() -> None:
    """Three configurations cover nine cells; each cell also has a best one of its own."""
    cells = [cell({block(10 + number): 0.0, block(number // 3): 0.005}) for number in range(9)]
    cells += [cell({block(number): 0.0}) for number in range(3)]
    assert serving(narrow(cells)) == {block(0), block(1), block(2)}


def test_a_member_that_later_ones_make_superfluous_is_dropped() -> None:
    """Greedily the one that covers four cells comes first, but the two halves, which are needed, cover all six."""
    first, second, greedy = block(1), block(2), block(3)
    covers = {0: first, 1: first, 2: first, 3: second, 4: second, 5: second}
    cells = [
        cell({choice: 0.0} | ({greedy: 0.0} if number in (1, 2, 3, 4) else {})) for number, choice in covers.items()
    ]
    cells = [replace(found, acceptable=frozenset(found.standings) - {DEFAULT}) for found in cells]
    assert serving(narrow(cells)) == {first, second}


@pytest.mark.parametrize(("loss", "covered"), [(0.0099, True), (0.0101, False)])
def test_a_cell_loses_no_more_than_one_percent(loss: float, covered: bool) -> None:
    cells = [cell({block(1): 0.0}), cell({block(2): 0.0, block(1): loss})]
    assert serving(narrow(cells)) == ({block(1)} if covered else {block(1), block(2)})


def test_a_gain_that_is_not_proved_covers_nothing() -> None:
    cells = [cell({block(1): 0.0}), cell({block(2): 0.0, block(1): 0.001}, unproved=[block(1)])]
    assert serving(narrow(cells)) == {block(1), block(2)}


def test_without_a_time_of_the_default_the_times_alone_decide() -> None:
    cells = [cell({block(size): 0.0, block(1): 0.005}, default_ratio=None) for size in (2, 3)]
    cells.append(cell({block(1): 0.0}, default_ratio=None))
    assert serving(narrow(cells)) == {block(1)}


def test_cells_that_accept_a_kernel_of_one_configuration_ask_for_none() -> None:
    cells = [cell({block(1): 0.0}), cell({block(2): 0.0, FREE: 0.0}, acceptable=[block(2), FREE])]
    assert [found.acceptable for found in narrow(cells)] == [{block(1)}, {FREE}]


def test_of_equal_covers_the_cheaper_is_taken_then_the_first_by_name() -> None:
    pair = {block(1): 0.0, block(2): 0.0}
    both = [cell(pair, acceptable=list(pair)), cell(pair, acceptable=list(pair))]
    assert serving(narrow(both)) == {block(1)}
    dear = [replace(found, standings={**found.standings, block(1): Standing(-0.69, -0.7, -0.6, 10)}) for found in both]
    assert serving(narrow(dear)) == {block(2)}


def test_kernels_without_configurations_are_not_touched() -> None:
    lean = ("synthetic.lean", "{}")
    cells = [cell({lean: 0.0, FREE: 0.001}), cell({FREE: 0.0, lean: 0.001})]
    assert narrow(cells) == tuple(cells)


LOSSES = st.dictionaries(
    st.sampled_from([*(block(size) for size in range(5)), FREE, ("synthetic.even", "{}")]),
    st.sampled_from([0.0, 0.002, 0.0099, 0.0101, 0.3]),
    min_size=1,
)


@given(losses=st.lists(LOSSES, min_size=1, max_size=7), chance=st.randoms(use_true_random=False))
def test_no_cell_becomes_worse_by_more_than_one_percent(
    losses: Sequence[Mapping[Choice, float]], chance: random.Random
) -> None:
    cells = []
    for found in losses:
        tied = [choice for choice, loss in found.items() if loss <= min(found.values()) + 0.002]
        cells.append(cell(found, acceptable=chance.sample(tied, chance.randint(1, len(tied)))))
    narrowed = narrow(cells)
    for before, after in zip(cells, narrowed, strict=True):
        assert after.acceptable
        slowest = max(before.standings[choice].log_ratio for choice in before.acceptable)
        for choice in after.acceptable:
            assert after.standings[choice].log_ratio <= slowest + math.log1p(MAX_LOSS) + 1e-9
            assert after.gains(choice)
        assert replace(after, acceptable=before.acceptable) == before
    order = list(range(len(cells)))
    chance.shuffle(order)
    assert serving(narrow([cells[index] for index in order])) == serving(narrowed)


def rows_of(rows: int, times: Mapping[int, float]) -> list[Measurement]:
    """A contest of the default, at 1000 ns, and of configurations of one kernel."""
    made = contest_rows(norm(rows), {"torch.rms_norm": 1000.0, "synthetic.lean": 1.0})
    lean = next(row for row in made if row.kernel_id == "synthetic.lean")
    default = next(row for row in made if row.is_default)
    return [default, *configured(lean, times)]


def test_a_table_holds_the_portfolio_alone() -> None:
    rows = [row for size in (1, 4, 16, 64) for row in rows_of(size, {size: 500.0, 99: 503.0})]
    form = compile_table(rows, ALL_KERNELS)
    assert {step.choice for entry in form.entries for leaf in entry.leaves() for step in leaf.chain} == {block(99)}
