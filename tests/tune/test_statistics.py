"""Paired log-ratios, the test for slower shapes, Holm's correction."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.measure.statistics import (
    PairedRatio,
    geometric_mean,
    half_shift,
    holm,
    paired_log_ratio,
    paired_logs,
    paired_ratios,
    percentile,
    rank_correlation,
    slower_p_value,
    student_t_upper_tail,
)

times = st.lists(st.floats(1e3, 1e9), min_size=1, max_size=16)


def noisy_pair(
    rng: np.random.Generator, rounds: int, ratio: float = 1.0, spikes: float = 0.0
) -> tuple[list[float], list[float]]:
    """Two candidates' round medians: 1% normal noise; a share `spikes` of the rounds of each is half as long again."""

    def one(center: float) -> list[float]:
        values = center * np.exp(rng.normal(0.0, 0.01, rounds))
        return [float(value) for value in values * np.where(rng.random(rounds) < spikes, 1.5, 1.0)]

    return one(1e6 * ratio), one(1e6)


def test_the_ratio_is_that_of_the_undisturbed_rounds() -> None:
    judged = paired_log_ratio([2.0, 2.0, 200.0, 2.0, 2.0, 2.0], [1.0] * 6)
    assert judged.ratio == pytest.approx(2.0, abs=1e-8)
    assert judged.low == pytest.approx(math.log(2.0), abs=1e-8)
    assert judged.low <= judged.mean_log_ratio <= judged.high


def test_pairs_cancel_a_drift_that_both_share() -> None:
    drift = [1.0, 1.3, 0.8, 2.0, 1.1, 0.7]
    judged = paired_log_ratio([1.1 * value for value in drift], drift)
    assert judged.high - judged.low < 1e-8
    assert judged.ratio == pytest.approx(1.1)


@given(times, st.randoms(use_true_random=False))
def test_the_interval_holds_the_estimate_and_mirrors_when_the_pair_is_swapped(
    baseline: list[float], chance: random.Random
) -> None:
    found = [value * chance.uniform(0.5, 2.0) for value in baseline]
    judged, swapped = paired_log_ratio(found, baseline), paired_log_ratio(baseline, found)
    assert judged.low <= judged.mean_log_ratio <= judged.high
    assert swapped.mean_log_ratio == pytest.approx(-judged.mean_log_ratio, abs=1e-8)
    assert (swapped.low, swapped.high) == pytest.approx((-judged.high, -judged.low), abs=1e-8)


def test_equal_samples_give_equal_intervals_to_the_last_bit() -> None:
    """Fixed values: they move only with the definition, never with a version of NumPy or the platform."""
    judged = paired_log_ratio([101, 98, 103, 99, 105, 97, 104, 100], [100] * 8)
    logs = [math.log(value) for value in (0.99, 1.0, 1.01, 1.03)]
    assert judged.mean_log_ratio == pytest.approx(statistics.fmean(logs), abs=1e-9)
    assert judged == PairedRatio(0.0073646992500000005, -0.0151780625, 0.03427236525)


def test_the_interquartile_mean_is_robust_and_its_interval_honest() -> None:
    """Why not the mean, and why not the median: errors and coverage with and without disturbed rounds."""
    rng = np.random.Generator(np.random.PCG64(1))
    rounds, repeats = 10, 400
    for spikes in (0.0, 0.05):
        errors: dict[str, list[float]] = {"interquartile": [], "mean": [], "median": []}
        covered = 0
        for _ in range(repeats):
            found, baseline = noisy_pair(rng, rounds, spikes=spikes)
            logs = [math.log(a / b) for a, b in zip(found, baseline, strict=True)]
            judged = paired_log_ratio(found, baseline)
            errors["interquartile"].append(judged.mean_log_ratio**2)
            errors["mean"].append(statistics.fmean(logs) ** 2)
            errors["median"].append(statistics.median(logs) ** 2)
            covered += judged.low <= 0.0 <= judged.high
        rms = {name: math.sqrt(statistics.fmean(squares)) for name, squares in errors.items()}
        assert 0.90 <= covered / repeats <= 0.98
        if spikes:
            assert rms["interquartile"] < rms["mean"] / 3
        else:
            assert rms["interquartile"] < min(1.25 * rms["mean"], 1.02 * rms["median"])


@given(
    samples=st.lists(st.lists(st.floats(0.5, 2.0), min_size=16, max_size=16), min_size=2, max_size=4),
    count=st.integers(1, 16),
)
def test_the_bootstrap_gives_what_sorting_every_resample_gives(samples: list[list[float]], count: int) -> None:
    """The definition, written out: the interquartile mean of each resample, and the 2.5% on either side."""
    logs = paired_logs([row[:count] for row in samples[1:]], samples[0][:count])
    raw = np.random.PCG64(0x6C61796572).random_raw(4000 * count)
    indices = (((raw >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(int).reshape(4000, count)
    cut = min(-(-count // 4), (count - 1) // 2)
    for row, judged in zip(logs, paired_ratios(logs), strict=True):
        means = np.sort(np.sort(row[indices], axis=1)[:, cut : count - cut].sum(axis=1)) * (1e-9 / (count - 2 * cut))
        assert judged.mean_log_ratio == np.sort(row)[cut : count - cut].sum() * (1e-9 / (count - 2 * cut))
        assert (judged.low, judged.high) == (means[100], means[3899])


@given(times, st.randoms(use_true_random=False), st.sampled_from([0.01, 0.05, 0.3]), st.sampled_from([0.0, 0.02]))
def test_an_interval_that_is_not_resampled_decides_the_same(
    baseline: list[float], chance: random.Random, decided: float, doubt: float
) -> None:
    """At every threshold up to the one that it was promised to be compared with."""
    logs = paired_logs([[base * chance.uniform(0.9, 1.2) for base in baseline]], baseline)
    (exact,), (quick,) = paired_ratios(logs, doubts=[doubt]), paired_ratios(logs, decided, [doubt])
    assert exact.mean_log_ratio == quick.mean_log_ratio
    assert quick.low <= quick.mean_log_ratio <= quick.high
    for threshold in (-decided, -0.01, 0.0, 0.005, decided):
        assert (quick.low > threshold) == (exact.low > threshold)
        assert (quick.high < threshold) == (exact.high < threshold)


def test_rounds_are_resampled_where_the_doubt_reaches_over_a_threshold() -> None:
    """None of the rounds is slower by 1%, but with a doubt of 2% one of them may be."""
    logs = np.array([[-64_538_521, -64_538_521, 0]])
    assert paired_ratios(logs, 0.01, [0.02]) == paired_ratios(logs, doubts=[0.02])
    assert paired_ratios(-logs, 0.01, [0.02]) == paired_ratios(-logs, doubts=[0.02])


def test_an_interval_that_is_not_resampled_is_as_wide_as_one_that_is() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    logs = paired_logs([noisy_pair(rng, 16, ratio=1.5)[0] for _ in range(300)], noisy_pair(rng, 16)[1])
    exact, quick = paired_ratios(logs), paired_ratios(logs, 0.05)
    widths = [(q.high - q.low) / (e.high - e.low) for q, e in zip(quick, exact, strict=True)]
    assert 0.9 < statistics.fmean(widths) < 1.1
    assert statistics.stdev(widths) > 0.0


def test_a_rank_correlation_says_how_a_series_follows_its_order() -> None:
    assert rank_correlation(np.array([1, 2, 5, 9, 100])) == 1.0
    assert rank_correlation(np.array([7, 6, 5, 1])) == -1.0
    assert rank_correlation(np.array([3, 3, 3])) == 0.0
    assert rank_correlation(np.array([3])) == 0.0
    # By hand, 1 - 6 x sum(d^2) / (n (n^2 - 1)) with d = 1, -1, 0, 1, -1; and with the mean rank 1.5 of a pair.
    assert rank_correlation(np.array([20, 10, 30, 50, 40])) == pytest.approx(0.8)
    assert rank_correlation(np.array([10, 10, 30])) == pytest.approx(math.sqrt(3) / 2)


def test_the_shift_between_halves_leaves_out_the_middle() -> None:
    assert half_shift(np.array([[1, 2, 3, 0, 14, 15, 16], [5, 5, 5, 0, 1, 9, 1]])).tolist() == [13, -4]
    assert half_shift(np.array([4])).tolist() == 0


def test_slower_is_found_and_equal_is_not() -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    assert slower_p_value(*noisy_pair(rng, 10, ratio=1.1)) < 1e-5
    assert slower_p_value(*noisy_pair(rng, 10, ratio=1.0)) > 0.5
    assert slower_p_value([1.5] * 4, [1.0] * 4) == 0.0
    assert slower_p_value([1.0] * 4, [1.0] * 4) == 1.0


@pytest.mark.parametrize("spikes", [0.0, 0.05])
def test_the_test_for_slower_keeps_its_level_at_the_threshold(spikes: float) -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    p_values = [slower_p_value(*noisy_pair(rng, 10, ratio=1.02, spikes=spikes)) for _ in range(1500)]
    assert sum(p < 0.05 for p in p_values) / len(p_values) < 0.07
    assert sum(p < 0.001 for p in p_values) <= 6


@pytest.mark.parametrize(
    ("t", "degrees", "tail"),
    # Quantiles of printed tables: P(T > t) = tail.
    [(6.314, 1, 0.05), (2.920, 2, 0.05), (2.353, 3, 0.05), (2.262, 9, 0.025), (3.250, 9, 0.005), (4.781, 9, 0.0005)],
)
def test_tail_of_students_t(t: float, degrees: int, tail: float) -> None:
    assert student_t_upper_tail(t, degrees) == pytest.approx(tail, rel=2e-3)
    assert student_t_upper_tail(-t, degrees) == pytest.approx(1 - tail, rel=1e-4)


def test_holm_steps_down() -> None:
    # Holm (1979) by hand: 0.01 <= 0.05/4, 0.013 <= 0.05/3, 0.03 > 0.05/2, so that 0.04 is not looked at.
    assert holm([0.03, 0.01, 0.04, 0.013]) == (False, True, False, True)
    assert holm([]) == ()
    assert holm([0.05]) == (True,)


@given(st.lists(st.floats(0.0, 1.0), max_size=12))
def test_holm_rejects_between_bonferroni_and_no_correction(p_values: list[float]) -> None:
    for p, rejected in zip(p_values, holm(p_values), strict=True):
        assert rejected or p > 0.05 / len(p_values)
        assert not rejected or p <= 0.05


def test_summaries() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert percentile([1.0, 2.0, 3.0], 10) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("found", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [math.nan]), ([math.inf], [1.0])]
)
def test_samples_that_cannot_be_paired_are_refused(found: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="time"):
        paired_log_ratio(found, baseline)
