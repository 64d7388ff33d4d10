"""Contests on a machine that drifts or is shared: others go before them, and alone they prove less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_tune.compile.distrust import disturbed_contests
from layerzero_tune.compile.judge import Choice, Verdict, judge
from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import CommandsHere
from tests.tune.synthetic_results import contest_rows, norm

DEFAULT: Choice = ("torch.rms_norm", "{}")
LEAN: Choice = ("synthetic.lean", "{}")
WIDE: Choice = ("synthetic.wide", "{}")
JITTER = (1.0, 1.002, 0.999, 1.001, 0.998, 1.003, 1.0, 0.997, 1.002, 0.999)

STEADY = (1.0,) * 10
TREND = tuple(1.0 + 0.03 * number for number in range(10))
STEP = (1.0,) * 5 + (1.3,) * 5
SMALL_TREND = tuple(1.0 + 0.004 * number for number in range(10))
LATE = (1.0,) * 9 + (1.3,)
UP_AND_DOWN = (1.0, 1.3, 1.0, 1.3, 1.0, 1.3, 1.0, 1.3, 1.0, 1.3)


def rounds(
    default: Sequence[float],
    lean: Sequence[float],
    repeat: int = 0,
    contention: float = 0.0,
    wide: Sequence[float] = (),
) -> list[Measurement]:
    """A contest with these times in units of 1000 ns; `wide` takes 2000 ns if nothing is said of it."""
    wide = wide or [2.0] * len(default)
    times = {"torch.rms_norm": default, "synthetic.lean": lean, "synthetic.wide": wide}
    made = contest_rows(norm(64), dict.fromkeys(times, 1.0), rounds=len(default), repeat=repeat)
    return [
        replace(row, samples_ns=tuple(1000.0 * time for time in times[row.kernel_id]), contention=contention)
        for row in made
    ]


def scaled(times: Sequence[float], factor: float) -> list[float]:
    return [time * factor * jitter for time, jitter in zip(times, JITTER, strict=True)]


def verdict(rows: Sequence[Measurement]) -> Verdict:
    ((found,),) = judge(rows).values()
    return found


@pytest.mark.parametrize(
    ("default", "distrusted"),
    [(STEADY, False), (TREND, True), (TREND[::-1], True), (SMALL_TREND, False), (LATE, False), (UP_AND_DOWN, False)],
)
def test_a_contest_is_distrusted_where_its_default_drifts(default: Sequence[float], distrusted: bool) -> None:
    rows = rounds(scaled(default, 1.0), STEADY)
    assert bool(disturbed_contests(rows)) == distrusted


def test_a_step_of_the_default_counts_as_a_drift() -> None:
    """Among 16 rounds: among 10 chance gives such an order too often."""
    rows = rounds([1.0, 0.99] * 4 + [1.3, 1.29] * 4, [1.0] * 16)
    assert disturbed_contests(rows) == {rows[0].contest_id}


def test_without_the_default_another_kernel_is_the_anchor() -> None:
    rows = [replace(row, samples_ns=()) if row.is_default else row for row in rounds(STEADY, TREND)]
    assert disturbed_contests([row for row in rows if row.kernel_id != "synthetic.wide"])


@pytest.mark.parametrize(("share", "distrusted"), [(0.0, False), (MAX_SHARE, False), (MAX_SHARE + 1e-3, True)])
def test_a_contest_beside_other_processes_is_distrusted(share: float, distrusted: bool) -> None:
    assert bool(disturbed_contests(rounds(STEADY, STEADY, contention=share))) == distrusted


def test_a_contest_of_one_round_and_one_without_times_are_not_looked_at() -> None:
    assert not disturbed_contests(rounds([1.0], [1.0]))
    assert not disturbed_contests(contest_rows(norm(64), {"torch.rms_norm": "died"}))
    everyone = ("torch.rms_norm", "synthetic.lean")
    assert not disturbed_contests(contest_rows(norm(64), dict.fromkeys(everyone, 1.0), screened=everyone))


@pytest.mark.parametrize(
    "disturbed", [rounds(TREND, scaled(STEADY, 0.1), 1), rounds(STEADY, scaled(STEADY, 0.1), 1, 0.2)]
)
def test_a_disturbed_contest_does_not_count_beside_another(disturbed: list[Measurement]) -> None:
    calm = rounds(STEADY, scaled(STEADY, 0.8))
    found = verdict([*calm, *disturbed])
    assert found.standings[LEAN] == verdict(calm).standings[LEAN]
    assert found.tied == verdict(calm).tied == {LEAN}


def test_a_kernel_that_only_a_disturbed_contest_holds_keeps_its_standing() -> None:
    calm = [row for row in rounds(STEADY, scaled(STEADY, 0.8)) if row.kernel_id != "synthetic.wide"]
    disturbed = rounds(TREND, TREND, 1)
    found = verdict([*calm, *disturbed])
    assert found.standings[LEAN].rounds == 10
    assert found.standings[WIDE].rounds == 10


def test_a_drift_that_both_sides_share_widens_nothing() -> None:
    found = verdict(rounds(TREND, scaled(TREND, 0.9)))
    calm = verdict(rounds(STEADY, scaled(STEADY, 0.9)))
    assert disturbed_contests(rounds(TREND, scaled(TREND, 0.9)))
    assert found.standings[LEAN].high == pytest.approx(calm.standings[LEAN].high, abs=1e-5)
    assert found.acceptable == {LEAN}


def test_a_ratio_that_moves_in_a_drifting_contest_must_gain_at_both_ends() -> None:
    """`lean` does not slow down as the default does: it gains 13% on average, and nothing in the first rounds."""
    found = verdict(rounds(TREND, scaled(STEADY, 1.0)))
    standing = found.standings[LEAN]
    assert standing.log_ratio < -0.1
    assert standing.low < math.log(1 / 1.27)
    assert standing.high > 0.0
    assert found.acceptable == {DEFAULT}
    large = verdict(rounds(TREND, scaled(STEADY, 0.5)))
    assert large.acceptable == {LEAN}


def test_noise_of_a_ratio_in_a_drifting_contest_is_not_counted_twice() -> None:
    """Its halves differ by 3%, which chance gives: the bootstrap has seen it already."""
    noisy = [0.9 * jitter for jitter in (1.0, 1.04, 0.97, 1.02, 0.98, 1.03, 1.01, 1.05, 0.99, 1.04)]
    drifting = [time * trend for time, trend in zip(noisy, TREND, strict=True)]
    assert disturbed_contests(rounds(TREND, drifting))
    found, calm = (verdict(rows).standings[LEAN] for rows in (rounds(TREND, drifting), rounds(STEADY, noisy)))
    assert (found.low, found.high) == pytest.approx((calm.low, calm.high), abs=1e-5)


def test_a_ratio_to_the_best_that_moves_leaves_a_tie() -> None:
    """`wide` is slower in every round, at first by 0.7%, in the end by 8%: which of these is true?"""
    wide = [0.5 * (1.007 + 0.008 * number) for number in range(10)]
    assert verdict(rounds(TREND, [0.5] * 10, wide=wide)).tied == {LEAN, WIDE}
    assert verdict(rounds(STEADY, [0.5] * 10, wide=wide)).tied == {LEAN}


@pytest.mark.parametrize(("share", "gains"), [(0.04, True), (0.06, False), (0.9, False)])
def test_a_gain_on_a_shared_machine_must_be_larger_than_what_a_neighbour_can_cost(share: float, gains: bool) -> None:
    """On 2 threads a share of 6% is 12% of a core: a kernel that waits for it may take 12% longer."""
    found = verdict(rounds(STEADY, scaled(STEADY, 0.9), contention=share))
    assert found.acceptable == ({LEAN} if gains else {DEFAULT})
    assert found.standings[LEAN].high - found.standings[LEAN].low <= 2.0 * math.log(2.0) + 0.01


def test_two_days_on_which_the_machine_ran_at_another_speed_say_what_one_says() -> None:
    times = {"torch.rms_norm": 1000.0, "synthetic.lean": 700.0, "synthetic.wide": 703.0}
    first, second = (contest_rows(norm(64), times, noise=0.02, repeat=repeat) for repeat in (0, 1))
    slower = [replace(row, samples_ns=tuple(2.0 * t for t in row.samples_ns), screen_ns=2000.0) for row in second]
    assert verdict([*first, *slower]).standings == verdict([*first, *second]).standings
    assert verdict([*first, *slower]).acceptable == verdict([*first, *second]).acceptable == {LEAN, WIDE}


def test_compile_says_how_many_contests_it_distrusts(command: CommandsHere, tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results")
    store.append([row for row in rounds(TREND, STEADY) if row.kernel_id == "torch.rms_norm"])
    ended = command("compile", store.directory, "--out", tmp_path / "tables")
    assert "1 contests ran beside other processes or while the machine drifted" in ended.output
    assert command("compile", store.directory, "--out", tmp_path / "tables", "--json").json["distrusted_contests"] == 1
