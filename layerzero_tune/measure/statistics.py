"""Judging samples: paired log-ratios with a bootstrap interval, and tests over many shapes.

All results depend on the samples alone, to the last bit: logarithms are rounded to whole billionths (`LOG_RESOLUTION`)
and summed as integers, and the bootstrap draws from the raw stream of PCG64, which NumPy keeps stable over versions and
platforms (NEP 19), unlike the streams of `Generator`'s methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

# Here, not where it is first used: numpy loads its random numbers late, and loses a Ctrl-C that comes meanwhile.
from numpy.random import PCG64
from numpy.typing import NDArray

LOG_RESOLUTION = 1e-9
CONFIDENCE = 0.95
RESAMPLES = 4000
SLOWER_THRESHOLD = 1.02
_SEED = 0x6C61796572  # any fixed number

Logs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Natural logarithm of times over a baseline's times, and its confidence interval; negative is faster."""

    mean_log_ratio: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return math.exp(self.mean_log_ratio)


def paired_log_ratio(times: Sequence[float], baseline: Sequence[float]) -> PairedRatio:
    """The interquartile mean of log(times[i] / baseline[i]), with a 95% percentile bootstrap interval.

    The two vectors hold the same rounds of one contest. The interquartile mean ignores a quarter of the rounds on
    either side. Simulated with 10 rounds: under clean normal noise its error is 1.1 times the plain mean's; where one
    time in twenty is half as long again, its error is a sixth. The 95% interval holds the truth in 93 to 95% of the
    cases with 5 to 16 rounds; the plain mean's in 82 to 92%.

    Raises:
        ValueError: the vectors are empty or differ in length, or a time is not positive and finite.
    """
    return paired_ratios(paired_logs([times], baseline))[0]


def paired_logs(times: Sequence[Sequence[float]], baseline: Sequence[float]) -> Logs:
    """log(times[k][i] / baseline[i]) in units of `LOG_RESOLUTION`, (choices, rounds).

    Raises:
        ValueError: as `paired_log_ratio`.
    """
    wrong = next((row for row in times if len(row) != len(baseline)), baseline)
    if not baseline or len(wrong) != len(baseline):
        raise ValueError(
            f"{len(wrong)} times beside {len(baseline)} of the baseline; required the same number, at least 1"
        )
    measured = np.array(times, dtype=np.float64).reshape(len(times), len(baseline))
    base = np.array(baseline, dtype=np.float64)
    if not ((measured > 0.0) & (measured < math.inf)).all() or not ((base > 0.0) & (base < math.inf)).all():
        raise ValueError("a time is not a positive finite number")
    # The C library's logarithm: NumPy's own differs in the last bit from processor to processor.
    logs = np.array(list(map(math.log, (measured / base).ravel().tolist())), dtype=np.float64)
    return np.rint(logs / LOG_RESOLUTION).astype(np.int64).reshape(measured.shape)


def paired_ratios(logs: Logs, decided: float = math.inf, doubts: Sequence[float] = ()) -> list[PairedRatio]:
    """For each row of `logs` (choices, rounds) what `paired_log_ratio` gives, its interval widened by its doubt.

    `decided` is for callers whose thresholds all lie within this log ratio of zero. Where every round lies beyond it on
    one side, so does every resample, and a bootstrap, which costs a hundred times as much, would decide nothing: there
    the interval is the normal one of a trimmed mean (Tukey and McLaughlin 1963), within the range of the rounds.
    """
    first, end = _interquartile(logs.shape[-1])
    kept = end - first
    ordered = np.sort(logs, axis=-1)
    totals = ordered[:, first:end].sum(axis=-1)
    smallest, largest = ordered[:, 0], ordered[:, -1]
    half_widths = _normal_half_widths(ordered, first, end)
    lows = np.maximum(totals - half_widths, kept * smallest)
    highs = np.minimum(totals + half_widths, kept * largest)
    doubt = np.array(doubts) if doubts else np.zeros(len(logs))
    limits = (decided + doubt) / LOG_RESOLUTION
    is_settled = (smallest > limits) | (largest < -limits) | (smallest == largest)
    for index in np.flatnonzero(~is_settled):
        lows[index], highs[index] = _bootstrap_interval(logs[index])
    scale = LOG_RESOLUTION / kept
    columns = (totals * scale, lows * scale - doubt, highs * scale + doubt)
    return [PairedRatio(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def slower_p_value(times: Sequence[float], baseline: Sequence[float], threshold: float = SLOWER_THRESHOLD) -> float:
    """One-sided p-value of "these times are above `threshold` times the baseline's": Student's t on paired log-ratios.

    A t test and no bootstrap, because a correction over hundreds of shapes asks for p-values below 1e-4, which
    resampling a handful of rounds cannot resolve. Each round is a median already; one that is disturbed all the same
    widens the spread more than it moves the mean, so the test then errs towards "not slower".

    Raises:
        ValueError: as `paired_log_ratio`, or fewer than two rounds.
    """
    (logs,) = paired_logs([times], baseline)
    count = len(logs)
    if count < 2:
        raise ValueError(f"{count} round, a test needs at least 2")
    excess = int(logs.sum()) / count - math.log(threshold) / LOG_RESOLUTION
    # Sum of squared deviations from exact integers: count x sum(x^2) - (sum x)^2, in Python's unbounded ones.
    values = [int(value) for value in logs]
    squares = (count * sum(value * value for value in values) - sum(values) ** 2) / count
    if squares == 0:
        return 0.0 if excess > 0 else 1.0
    return student_t_upper_tail(excess / math.sqrt(squares / (count - 1) / count), count - 1)


def student_t_upper_tail(t: float, degrees: int) -> float:
    """P(T > t) for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan2(abs(t), math.sqrt(degrees))
    cosine_squared = math.cos(theta) ** 2
    term = math.cos(theta) if degrees % 2 else 1.0
    series = 0.0
    for k in range(degrees % 2, degrees - 1, 2):
        series += term
        term *= cosine_squared * (k + 1) / (k + 2)
    inside = math.sin(theta) * series
    if degrees % 2:
        inside = 2.0 / math.pi * (theta + inside)
    tail = max(0.0, (1.0 - inside) / 2.0)
    return tail if t >= 0 else 1.0 - tail


def rank_correlation(values: Logs) -> float:
    """Spearman's rank correlation of a series with its own order, ties with their mean rank; 0 for a constant one."""
    ranks = (values[:, None] > values).sum(axis=1) + (values[:, None] >= values).sum(axis=1)
    places = 2 * np.arange(len(values)) + 1
    ranks, places = ranks - len(values), places - len(values)
    spread = int((ranks * ranks).sum()) * int((places * places).sum())
    return int((ranks * places).sum()) / math.sqrt(spread) if spread else 0.0


def half_shift(logs: Logs) -> Logs:
    """Along the last axis, the median of the second half less that of the first; the round in the middle is in neither.

    Medians are lower ones: values that occur, so that they stay whole numbers.
    """
    half = logs.shape[-1] // 2
    if not half:
        return np.zeros(logs.shape[:-1], dtype=np.int64)
    rank = (half - 1) // 2
    first, second = (np.partition(part, rank, axis=-1)[..., rank] for part in (logs[..., :half], logs[..., -half:]))
    return np.asarray(second - first)


def holm(p_values: Sequence[float], alpha: float = 0.05) -> tuple[bool, ...]:
    """Which hypotheses Holm's step-down procedure rejects, at a family-wise error rate of at most `alpha`."""
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return tuple(rejected)


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values:
        raise ValueError("no values, a geometric mean needs at least one")
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated linearly between neighbours.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values, a percentile needs at least one")
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def _interquartile(count: int) -> tuple[int, int]:
    """The first rank, and the first after it, that are left without a quarter (rounded up) on either side."""
    cut = min(-(-count // 4), (count - 1) // 2)
    return cut, count - cut


def _normal_half_widths(ordered: Logs, first: int, end: int) -> Logs:
    """Half of a 95% interval of the interquartile sum of each row, which is in ascending order."""
    count = ordered.shape[-1]
    winsorised = np.clip(ordered, ordered[:, first, None], ordered[:, end - 1, None])
    deviations = winsorised.std(axis=-1, ddof=1) if count > 1 else np.zeros(len(ordered))
    # The mean of the ranks kept deviates by deviation x sqrt(count) / kept; their sum by kept times that.
    return np.rint(1.96 * deviations * math.sqrt(count)).astype(np.int64)


def _bootstrap_interval(logs: Logs) -> tuple[int, int]:
    """The percentile bootstrap interval of the interquartile sum of one vector.

    No resample is sorted: how often each value, in ascending order, was drawn so far says how many of the ranks that
    count it and its predecessors take up. The sums are whole numbers below 2^53, so floats hold them exactly.
    """
    order = np.argsort(logs, kind="stable")
    values = logs[order].astype(np.float64)
    first, end = _interquartile(len(logs))
    drawn = _draws(len(logs))[order[:-1]]
    for below, row in pairwise(drawn):  # row by row: `cumsum` along the first axis takes ten times as long
        row += below
    np.clip(drawn, first, end, out=drawn)
    sums = values[-1] * end - values[0] * first - np.diff(values) @ drawn.astype(np.float64)
    tail = int((1.0 - CONFIDENCE) / 2.0 * RESAMPLES)
    sums.partition((tail, RESAMPLES - 1 - tail))
    return int(sums[tail]), int(sums[RESAMPLES - 1 - tail])


@lru_cache(maxsize=64)
def _draws(count: int) -> NDArray[np.int16]:
    """How often each of `count` values is drawn in each resample, (count, resamples): indices from the high halves of
    PCG64's raw 64-bit numbers."""
    raw = PCG64(_SEED).random_raw(RESAMPLES * count)
    high = np.asarray(raw, dtype=np.uint64) >> np.uint64(32)
    indices = ((high * np.uint64(count)) >> np.uint64(32)).astype(np.int64).reshape(RESAMPLES, count)
    return np.stack([(indices == value).sum(axis=1, dtype=np.int16) for value in range(count)])
