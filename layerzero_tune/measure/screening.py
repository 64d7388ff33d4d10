"""Which candidates a brief look cannot rule out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

# From the median absolute deviation to the standard deviation, and from a mean's standard error to a median's, both for
# normal noise.
_MAD_TO_SIGMA = 1.4826
_MEDIAN_TO_MEAN = 1.2533


def finalists(screened: Mapping[int, Sequence[float]], margin: float) -> frozenset[int]:
    """The candidates whose median time is within max(margin, 3 sigma) of the best.

    Sigma is that of the difference of two medians. The noise is the machine's more than a kernel's, and each candidate
    has few times: so it is taken from the deviations of all of them together.
    """
    if not screened:
        return frozenset()
    logs = {index: [math.log(max(time, 1.0)) for time in times] for index, times in screened.items()}
    medians = {index: statistics.median(values) for index, values in logs.items()}
    deviations = [
        abs(value - medians[index]) * math.sqrt(len(values) / (len(values) - 1))
        for index, values in logs.items()
        if len(values) > 1
        for value in values
    ]
    sigma = _MAD_TO_SIGMA * statistics.median(deviations) if deviations else 0.0
    best = min(medians, key=lambda index: medians[index])

    def reach(index: int) -> float:
        spread = sigma * _MEDIAN_TO_MEAN * math.sqrt(1 / len(logs[index]) + 1 / len(logs[best]))
        return max(math.log1p(margin), 3 * spread)

    return frozenset(index for index, median in medians.items() if median - medians[best] <= reach(index))
