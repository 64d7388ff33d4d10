"""Judging a gain by its surroundings: a table serves the sizes between the measured ones too.

Kernels' times jump with whether a length is even or fills whole tiles, so a choice that gains at one size may lose at
the next. A gain counts where the measured cells around it, taken together, say that it holds between them as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.measure.statistics import LOG_RESOLUTION

# A cell speaks for sizes up to this factor away, with a weight that falls linearly in log distance (over several axes
# the Euclidean one). Wider, clean crossings between kernels would cost the winners around them too.
# Chosen on 654 contests of the quick preset on a Xeon with 2 cores, judged by 400 other shapes: without this pass the
# table was slower than the default at 4 of them and its efficiency was 0.992; with it, at none and 0.984.
REACH = 2.0
# How many downside deviations of the surroundings the mean gain must exceed.
DEVIATIONS = 1.0


def settle(verdicts: Sequence[Verdict], free: Sequence[int]) -> tuple[Verdict, ...]:
    """The verdicts of one static key, with what is acceptable narrowed to gains that hold in their surroundings.

    Where none of a cell's acceptable choices holds, the fastest proved gain that does takes their place, or else the
    default. Cells whose reference is not the default stay as they are: nothing is known to be safer there. `free`
    gives the axes that distances are measured on.
    """
    places = [[math.log(verdict.sizes[axis]) for axis in free] for verdict in verdicts]
    return tuple(_settled(index, verdicts, places) for index in range(len(verdicts)))


def _settled(index: int, verdicts: Sequence[Verdict], places: Sequence[Sequence[float]]) -> Verdict:
    verdict = verdicts[index]
    if verdict.reference != verdict.default or verdict.acceptable == {verdict.default}:
        return verdict
    reach = math.log(REACH) * math.sqrt(len(places[index]))
    weights = {
        other: weight
        for other, place in enumerate(places)
        if (weight := 1.0 - math.dist(place, places[index]) / reach) > 0.0
    }

    def holds(choice: Choice) -> bool:
        around = [
            (weight, verdicts[other].standings[choice].log_ratio)
            for other, weight in weights.items()
            if choice in verdicts[other].standings
        ]
        return _expected_log_ratio(around) < 0.0

    holding = frozenset(choice for choice in verdict.acceptable if holds(choice))
    if not holding:
        gaining = [choice for choice in verdict.standings if verdict.gains(choice) and holds(choice)]
        fastest = min(
            gaining, key=lambda choice: (verdict.standings[choice].log_ratio, choice), default=verdict.default
        )
        holding = frozenset({fastest})
    return replace(verdict, acceptable=holding)


def _expected_log_ratio(around: Sequence[tuple[float, float]]) -> float:
    """The weighted mean of log ratios to the default plus their downside deviation, rounded as all logarithms here are.

    The downside deviation (Sortino) counts only what is slower than the mean: neighbours that gain even more are no
    reason for doubt.
    """
    total = math.fsum(weight for weight, _ in around)
    mean = math.fsum(weight * ratio for weight, ratio in around) / total
    variance = math.fsum(weight * max(ratio - mean, 0.0) ** 2 for weight, ratio in around) / total
    return round((mean + DEVIATIONS * math.sqrt(variance)) / LOG_RESOLUTION) * LOG_RESOLUTION
