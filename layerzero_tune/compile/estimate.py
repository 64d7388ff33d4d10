"""Estimates: what is expected of a choice at some sizes, how sure that is, and what is lost by taking another one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from layerzero_tune.compile.arrays import Floats
from layerzero_tune.measure.statistics import LOG_RESOLUTION


@dataclass(frozen=True)
class Estimate:
    """What is expected of a choice at some sizes, in log(time / time of the reference); negative is faster.

    Attributes:
        log_ratio: the height at these sizes of a plane through the cells around.
        upper: that and `regret.DEVIATIONS` downside deviations from the plane (Sortino): only what is slower than the
            plane counts, for cells that gain even more are no reason for doubt.
        doubt: standard deviation of what the choice may really take: the spread about the plane, the intervals of the
            measurements (a screening's bounds say nothing of what is likely), and what may change over the distance to
            the nearest of them. On the committed results, cells predicted without themselves: in six groups by doubt
            (0.017 to 0.32) the root mean square errors are 0.025 to 0.28; 74% lie within it, 94% within twice.
    """

    log_ratio: float
    upper: float
    doubt: float


class Estimates(NamedTuple):
    """The same at many sizes, each (sizes,)."""

    log_ratio: Floats
    upper: Floats
    doubt: Floats


def largest_loss(own: Estimate, others: Iterable[Estimate]) -> float:
    """The largest loss to any one of the others that is to be expected, 0 without any."""
    return max((_expected_loss(own, other) for other in others), default=0.0)


def _expected_loss(own: Estimate, other: Estimate) -> float:
    """E[max(0, own - other)] of two normal variables."""
    mean = own.log_ratio - other.log_ratio
    deviation = math.hypot(own.doubt, other.doubt)
    if deviation == 0.0:
        return max(0.0, mean)
    z = mean / deviation
    density = math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)
    loss = mean * (1.0 + math.erf(z / math.sqrt(2.0))) / 2.0 + deviation * density
    return round(loss / LOG_RESOLUTION) * LOG_RESOLUTION
