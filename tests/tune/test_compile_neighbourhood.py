"""Gains that the measured surroundings do not bear out give way; those that they do stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.compile.judge import Choice, Standing, Verdict, judge
from layerzero_tune.compile.neighbourhood import settle
from layerzero_tune.compile.regret import RegretModel
from tests.tune.synthetic_results import compiled, contest_rows, measured, norm, served, table_of

DEFAULT: Choice = ("torch.rms_norm", "{}")
LEAN: Choice = ("synthetic.lean", "{}")
WIDE: Choice = ("synthetic.wide", "{}")


def verdicts(times: Mapping[int, Mapping[str, float]]) -> Sequence[Verdict]:
    """Verdicts along the axis of rows: by number of rows the kernels' times."""
    rows = [row for number, found in times.items() for row in contest_rows(norm(number), found)]
    (along,) = judge(rows).values()
    return along


def acceptable(times: Mapping[int, Mapping[str, float]]) -> list[frozenset[Choice]]:
    return [verdict.acceptable for verdict in settled(verdicts(times))]


def settled(along: Sequence[Verdict]) -> tuple[Verdict, ...]:
    return settle(RegretModel(tuple(along), free=(0,)))


def lean(ratio: float) -> dict[str, float]:
    return {"torch.rms_norm": 1000.0, "synthetic.lean": 1000.0 * ratio}


def test_a_small_gain_beside_a_larger_loss_gives_way() -> None:
    assert acceptable({64: lean(0.95), 70: lean(1.30), 77: lean(0.95)}) == [{DEFAULT}] * 3


def test_a_gain_stays_where_all_around_it_gains() -> None:
    assert acceptable({64: lean(0.95), 70: lean(0.90), 77: lean(0.30)}) == [{LEAN}] * 3


def test_cells_out_of_reach_do_not_count() -> None:
    assert acceptable({64: lean(0.95), 200: lean(3.0)}) == [{LEAN}, {DEFAULT}]


def test_a_large_gain_beside_a_steep_crossing_stays() -> None:
    assert acceptable({64: lean(0.6), 110: lean(1.1)}) == [{LEAN}, {DEFAULT}]


def test_the_fastest_gain_that_holds_takes_the_place_of_one_that_does_not() -> None:
    times = {
        64: lean(0.90) | {"synthetic.wide": 950.0},
        70: lean(1.50) | {"synthetic.wide": 960.0},
    }
    assert acceptable(times) == [{WIDE}, {WIDE}]


def test_what_takes_its_place_must_be_a_proved_gain() -> None:
    times = {
        64: lean(0.90) | {"synthetic.wide": 995.0},
        70: lean(1.50) | {"synthetic.wide": 995.0},
    }
    assert acceptable(times) == [{DEFAULT}, {DEFAULT}]


def test_without_a_time_of_the_default_nothing_changes() -> None:
    times = {64: {"synthetic.lean": 900.0, "synthetic.wide": 1000.0}, 70: {"synthetic.lean": 2000.0}}
    before = verdicts(times)
    assert settled(before) == tuple(before)


def in_doubt(verdict: Verdict, log_ratio: float) -> Verdict:
    """The verdict with a gain (or loss) of `lean` that its contests do not prove."""
    standing = Standing(log_ratio, log_ratio - 0.02, log_ratio + 0.02, 10)
    return replace(
        verdict,
        standings={**verdict.standings, LEAN: standing},
        tied=frozenset({DEFAULT, LEAN}),
        acceptable=frozenset({DEFAULT}),
    )


@pytest.mark.parametrize(
    ("log_ratio", "beside", "expected"),
    [(-0.015, 0.9, {DEFAULT, LEAN}), (0.005, 0.9, {DEFAULT}), (-0.015, 1.0, {DEFAULT})],
)
def test_a_gain_in_doubt_may_count_where_its_surroundings_bear_it_out(
    log_ratio: float, beside: float, expected: set[Choice]
) -> None:
    low, middle, high = verdicts({64: lean(beside), 70: lean(1.0), 77: lean(beside)})
    assert settled((low, in_doubt(middle, log_ratio), high))[1].acceptable == expected


def test_the_table_serves_the_default_where_a_gain_is_a_matter_of_luck() -> None:
    ratios = {16: 0.5, 32: 0.5, 64: 0.93, 80: 1.4, 96: 0.95, 512: 0.6, 1024: 0.6}
    rows = measured(
        [norm(number) for number in ratios],
        lambda context: lean(ratios[context.rows or 0]),
    )
    table = table_of(compiled(rows))
    assert [served(table, norm(number)) for number in (16, 32)] == ["synthetic.lean"] * 2
    assert [served(table, norm(number)) for number in (64, 70, 80, 90, 96)] == ["torch.rms_norm"] * 5
    assert [served(table, norm(number)) for number in (512, 1024)] == ["synthetic.lean"] * 2


@given(st.dictionaries(st.integers(1, 4096), st.floats(0.2, 5.0), min_size=1, max_size=12))
def test_it_adds_no_choice_that_is_neither_proved_nor_likely(ratios: dict[int, float]) -> None:
    before = verdicts({number: lean(ratio) for number, ratio in ratios.items()})
    for was, now in zip(before, settled(before), strict=True):
        likely = {choice for choice in was.tied if was.standings[choice].log_ratio < 0.0}
        assert now.acceptable
        assert all(choice == DEFAULT or was.gains(choice) or choice in likely for choice in now.acceptable)
        assert was.acceptable != {DEFAULT} or DEFAULT in now.acceptable
