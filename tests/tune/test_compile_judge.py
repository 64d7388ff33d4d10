"""Verdicts: winners, ties, and contract 4, on contests whose optimum is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.compile.distrust import disturbed_contests
from layerzero_tune.compile.judge import MINIMUM_GAIN, Choice, Verdict, judge
from layerzero_tune.measure.statistics import LOG_RESOLUTION, paired_log_ratio
from layerzero_tune.results.measurement import Measurement, Status
from tests.tune.synthetic_results import contest_rows, full, norm

DEFAULT: Choice = ("torch.rms_norm", "{}")
LEAN: Choice = ("synthetic.lean", "{}")
WIDE: Choice = ("synthetic.wide", "{}")


def verdict(rows: Sequence[Measurement]) -> Verdict:
    """The verdict of rows that are all of one cell."""
    ((found,),) = judge(rows).values()
    return found


def test_the_fastest_kernel_wins_by_its_ratio_to_the_default() -> None:
    times = {"torch.rms_norm": 1000.0, "synthetic.lean": 500.0, "synthetic.wide": 800.0}
    found = verdict(contest_rows(norm(64), times, noise=0.02))
    assert found.best == LEAN
    assert found.tied == {LEAN}
    assert found.acceptable == {LEAN}
    assert found.standings[LEAN].log_ratio == pytest.approx(math.log(0.5), abs=0.03)
    assert found.standings[DEFAULT].log_ratio == 0.0
    assert found.regret(WIDE) == pytest.approx(math.log(1.6), abs=0.03)
    assert found.regret(("synthetic.absent", "{}")) == math.inf
    assert found.sizes == (64, 1024)


@pytest.mark.parametrize(("gain", "accepted"), [(0.009, False), (0.0101, True), (-0.05, False)])
def test_a_gain_counts_above_one_percent(gain: float, accepted: bool) -> None:
    found = verdict(contest_rows(norm(64), {"torch.rms_norm": 1000.0 * (1.0 + gain), "synthetic.lean": 1000.0}))
    assert found.acceptable == ({LEAN} if accepted else {DEFAULT})


def test_a_gain_must_be_proved_not_only_estimated() -> None:
    """4% on average, but over four rounds of 10% noise: the bound is what counts."""
    for number in range(1, 40):
        rows = contest_rows(norm(number), {"torch.rms_norm": 1040.0, "synthetic.lean": 1000.0}, noise=0.1, rounds=4)
        found = verdict(rows)
        lean, default = (next(row for row in rows if row.kernel_id == name) for name, _ in (LEAN, DEFAULT))
        proved = paired_log_ratio(lean.samples_ns, default.samples_ns).high < -math.log(1.01)
        assert (found.acceptable == {LEAN}) == proved
        assert proved or found.acceptable == {DEFAULT}


def test_the_default_is_chosen_where_it_is_tied_with_the_best() -> None:
    times = {"torch.rms_norm": 1002.0, "synthetic.lean": 1000.0, "synthetic.wide": 1500.0}
    found = verdict(contest_rows(norm(64), times))
    assert found.best == LEAN
    assert found.tied == {DEFAULT, LEAN}
    assert found.acceptable == {DEFAULT}


def test_a_tie_with_the_default_outweighs_a_small_proved_gain() -> None:
    """`lean` is the best, but varies so much that the default ties with it; `wide` is surely 2% faster than that."""
    made = contest_rows(norm(64), {"torch.rms_norm": 1000.0, "synthetic.lean": 1.0, "synthetic.wide": 980.0})
    wild = tuple(1000.0 * factor for factor in (0.7, 1.2, 0.75, 1.15, 0.8, 1.1, 0.9, 1.05, 0.95, 0.85))
    rows = [
        replace(
            row, samples_ns=wild if row.kernel_id == LEAN[0] else (980.0 if row.kernel_id == WIDE[0] else 1000.0,) * 10
        )
        for row in made
    ]
    found = verdict(rows)
    assert found.best == LEAN
    assert found.tied == {DEFAULT, LEAN, WIDE}
    assert found.standings[WIDE].high < -math.log1p(MINIMUM_GAIN)
    assert found.acceptable == {DEFAULT}


def test_tied_kernels_that_gain_are_all_acceptable() -> None:
    times = {"torch.rms_norm": 2000.0, "synthetic.lean": 1000.0, "synthetic.wide": 1003.0, "synthetic.even": 1100.0}
    assert verdict(contest_rows(norm(64), times)).acceptable == {LEAN, WIDE}
    noisy = {"torch.rms_norm": 2000.0, "synthetic.lean": 1000.0, "synthetic.wide": 1000.0}
    ties = [verdict(contest_rows(norm(rows), noisy, noise=0.03)).acceptable == {LEAN, WIDE} for rows in range(1, 41)]
    assert sum(ties) >= 36, "equal kernels are shown to differ in no more than one case of twenty"


@pytest.mark.parametrize("status", ["failed", "wrong", "out_of_memory", "timeout", "died", "unavailable", "refused"])
def test_a_default_without_a_time_leaves_the_choice_to_the_fastest(status: Status) -> None:
    times = {"torch.rms_norm": status, "synthetic.lean": 900.0, "synthetic.wide": 902.0, "synthetic.even": 1000.0}
    found = verdict(contest_rows(norm(64), times))
    assert found.default == DEFAULT
    assert found.reference == LEAN
    assert found.acceptable == {LEAN, WIDE}
    assert DEFAULT not in found.standings


@pytest.mark.parametrize("status", ["wrong", "failed", "timeout"])
def test_only_kernels_that_passed_have_a_standing(status: Status) -> None:
    """Even if a time was written beside the status."""
    made = contest_rows(norm(64), {"torch.rms_norm": 1000.0, "synthetic.lean": 500.0})
    rows = [row if row.is_default else replace(row, status=status) for row in made]
    assert verdict(rows).acceptable == {DEFAULT}
    assert LEAN not in verdict(rows).standings


def test_a_cell_in_which_nothing_has_a_time_has_no_verdict() -> None:
    assert judge(contest_rows(norm(64), {"torch.rms_norm": "died", "synthetic.lean": "wrong"})) == {}


def test_times_of_different_contests_are_not_compared() -> None:
    """The second contest ran on a machine three times as slow, where `wide` was as fast as here the default."""
    first = contest_rows(norm(64), {"torch.rms_norm": 1000.0, "synthetic.lean": 700.0})
    second = contest_rows(norm(64), {"torch.rms_norm": 3000.0, "synthetic.wide": 1000.0}, repeat=1)
    found = verdict([*first, *second])
    assert found.standings[WIDE].log_ratio == pytest.approx(math.log(1 / 3), abs=1e-6)
    assert found.standings[LEAN].log_ratio == pytest.approx(math.log(0.7), abs=1e-6)
    assert found.acceptable == {WIDE}


def test_contests_of_one_cell_are_pooled() -> None:
    """Calls with equal sizes and another split of batch x heads are one cell."""
    times = {"torch.sdpa": 1000.0, "synthetic.fused": 500.0}
    rows = [*contest_rows(full(8, 64), times), *contest_rows(full(8, 64, batch_size=4), times)]
    assert verdict(rows).standings[("synthetic.fused", "{}")].rounds == 20


def test_a_screening_proves_a_gain_only_where_it_is_large() -> None:
    """A default that takes seconds is screened alone, and so are its rivals."""
    everyone = ("torch.rms_norm", "synthetic.lean", "synthetic.wide")
    close = {"torch.rms_norm": 1000.0, "synthetic.lean": 600.0, "synthetic.wide": 900.0}
    assert verdict(contest_rows(norm(64), close, screened=everyone)).acceptable == {DEFAULT}
    far = {"torch.rms_norm": 1000.0, "synthetic.lean": 100.0, "synthetic.wide": 900.0}
    found = verdict(contest_rows(norm(64), far, screened=everyone))
    assert found.acceptable == {LEAN}
    assert found.standings[LEAN].rounds == 0
    assert found.standings[LEAN].low < found.standings[LEAN].log_ratio < found.standings[LEAN].high
    in_billionths = found.standings[LEAN].log_ratio / LOG_RESOLUTION
    assert in_billionths == pytest.approx(round(in_billionths), abs=1e-6), "its last bits are those of any machine"


def test_a_screened_kernel_does_not_beat_a_measured_one() -> None:
    times = {"torch.rms_norm": 1000.0, "synthetic.lean": 600.0, "synthetic.wide": 599.0}
    found = verdict(contest_rows(norm(64), times, screened=("synthetic.wide",)))
    assert found.best == LEAN
    assert found.acceptable == {LEAN}


def test_verdicts_are_grouped_by_static_key_and_sorted_by_sizes() -> None:
    times = {"torch.rms_norm": 1000.0}
    rows = [row for size in (512, 8, 64) for row in contest_rows(norm(size), times)]
    rows += contest_rows(full(8, 64), {"torch.sdpa": 1000.0})
    found = judge(rows)
    assert [operation for operation, _ in found] == ["attention.full", "norm.rms"]
    assert [v.sizes for v in list(found.values())[1]] == [(8, 1024), (64, 1024), (512, 1024)]


SAMPLES = st.lists(st.floats(0.5, 2.0), min_size=8, max_size=8)


@given(samples=st.lists(SAMPLES, min_size=6, max_size=6), order=st.randoms(use_true_random=False))
def test_contract_four_and_independence_of_order(samples: list[list[float]], order: random.Random) -> None:
    """Over two contests of a cell, or the one of them that nothing disturbed."""
    times = {"torch.rms_norm": 1.0, "synthetic.lean": 1.0, "synthetic.wide": 1.0}
    made = [row for repeat in (0, 1) for row in contest_rows(norm(64), times, rounds=8, repeat=repeat)]
    rows = [replace(row, samples_ns=tuple(found)) for row, found in zip(made, samples, strict=True)]
    found = verdict(rows)
    assert found.acceptable
    disturbed = disturbed_contests(rows)
    trusted = {row.contest_id for row in rows} - disturbed or disturbed
    pooled = {
        name: [
            time
            for row in sorted(rows, key=lambda row: row.contest_id)
            if row.kernel_id == name and row.contest_id in trusted
            for time in row.samples_ns
        ]
        for name in times
    }
    for name, _ in found.acceptable - {DEFAULT}:
        assert paired_log_ratio(pooled[name], pooled[DEFAULT[0]]).high < -math.log1p(MINIMUM_GAIN)
    order.shuffle(rows)
    assert verdict(rows) == found


def test_times_of_a_gpu_that_was_slowed_down_bear_no_witness() -> None:
    usual = contest_rows(norm(8), {"torch.rms_norm": 1000.0, "synthetic.lean": 900.0})
    slowed = contest_rows(norm(8), {"torch.rms_norm": 1000.0, "synthetic.lean": 500.0}, repeat=1)
    slowed = [replace(row, gpu={"slowed": ["power cap"]}) for row in slowed]
    assert judge([*usual, *slowed]) == judge(usual)
    assert judge(slowed) == {}
    assert disturbed_contests([*usual, *slowed]) == {slowed[0].contest_id}
