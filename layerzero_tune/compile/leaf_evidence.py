"""The evidence of a leaf: margin over the runner-up and speedup over the default, from its verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerzero_tune.compile.form import Evidence
from layerzero_tune.compile.judge import MINIMUM_GAIN, Choice, Verdict

# Digits of a ratio that are written down: finer than any clock, coarser than where exponentials differ by machine.
_DIGITS = 6


def is_proved(choice: Choice, default: Choice, verdicts: Sequence[Verdict]) -> bool:
    """Whether the measured cells of a leaf, taken together, prove that the choice gains on the default by more than
    `MINIMUM_GAIN` (contract 4); true for the default itself, and where it has no time to gain on."""
    least = least_gain(choice, default, verdicts)
    return least is None or least > math.log1p(MINIMUM_GAIN)


def least_gain(choice: Choice, default: Choice, verdicts: Sequence[Verdict]) -> float | None:
    """The lower end of the 95% interval of a choice's mean gain on the default, in log time, over these cells, whose
    contests are independent of each other; None for the default itself, and where it has no time."""
    against = [verdict.standings for verdict in verdicts if verdict.reference == default != choice]
    found = [standings[choice] for standings in against if choice in standings]
    if not found:
        return None
    mean = math.fsum(standing.log_ratio for standing in found) / len(found)
    half = math.sqrt(math.fsum((standing.high - standing.log_ratio) ** 2 for standing in found)) / len(found)
    return -(mean + half)


def evidence_of(choice: Choice, default: Choice, verdicts: Sequence[Verdict]) -> Evidence | None:
    """What speaks for a choice over the measured cells of its leaf, None where it holds none."""
    standings = [verdict.standings.get(choice) for verdict in verdicts]
    if not standings or any(standing is None for standing in standings):
        return None
    own = [standing for standing in standings if standing is not None]
    ahead = {
        other: sum(
            verdict.standings[other].log_ratio - standing.log_ratio
            for verdict, standing in zip(verdicts, own, strict=True)
        )
        / len(verdicts)
        for other in verdicts[0].standings
        if other != choice and all(other in verdict.standings for verdict in verdicts)
    }
    runner_up = min(ahead, key=lambda other: (ahead[other], other)) if ahead else None
    speedup: float | None = None
    if choice == default:
        speedup = 1.0
    elif default in ahead:
        speedup = round(math.exp(ahead[default]), _DIGITS)
    least = least_gain(choice, default, verdicts)
    return Evidence(
        points=tuple(verdict.sizes for verdict in verdicts),
        speedup=speedup,
        least_speedup=None if least is None else round(math.exp(least), _DIGITS),
        runner_up=None if runner_up is None else runner_up[0],
        margin=None if runner_up is None else round(math.expm1(ahead[runner_up]), _DIGITS),
        rounds=sum(standing.rounds for standing in own),
        measured_at=max(verdict.measured_at for verdict in verdicts),
    )
