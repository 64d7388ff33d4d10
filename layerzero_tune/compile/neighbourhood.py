"""Judging a gain by its surroundings: a table serves the sizes between the measured ones too.

Kernels' times jump with whether a length is even or fills whole tiles, so a choice that gains at one size may lose at
the next. A gain counts where the measured cells around it, taken together, say that it holds between them as well.
Where they say so of a gain that the contests at one size are too noisy to prove, it may count there too.
"""

from __future__ import annotations

import math
from dataclasses import replace

from layerzero_tune.compile.judge import MINIMUM_GAIN, Standing, Verdict
from layerzero_tune.compile.regret import Estimate, RegretModel


def settle(model: RegretModel) -> tuple[Verdict, ...]:
    """The verdicts of the model, with what is acceptable narrowed to gains that it expects to hold around them, and
    widened by gains that they make likely where the contests alone do not prove them.

    Where none of a cell's acceptable choices holds, the fastest proved gain that does takes their place, or else the
    default. Cells whose reference is not the default stay as they are: nothing is known to be safer there. Whoever lets
    a likely gain serve has to prove it over all cells that it serves (`leaf_evidence.is_proved`).
    """
    return tuple(_settled(verdict, model) for verdict in model.verdicts)


def _settled(verdict: Verdict, model: RegretModel) -> Verdict:
    if verdict.reference != verdict.default:
        return verdict
    around = model.estimates(verdict.tied | verdict.acceptable, verdict.sizes)
    likely = frozenset(
        choice
        for choice in verdict.tied - {verdict.default}
        if _is_likely(verdict.standings[choice], around.get(choice))
    )
    if verdict.acceptable == {verdict.default}:
        return replace(verdict, acceptable=verdict.acceptable | likely)
    holding = frozenset(choice for choice in verdict.acceptable if _holds(around.get(choice)))
    if not holding:
        gaining = {choice for choice in verdict.standings if verdict.gains(choice)}
        around = model.estimates(gaining, verdict.sizes)
        fastest = min(
            (choice for choice in gaining if _holds(around.get(choice))),
            key=lambda choice: (verdict.standings[choice].log_ratio, choice),
            default=verdict.default,
        )
        holding = frozenset({fastest})
    return replace(verdict, acceptable=holding | likely)


def _holds(around: Estimate | None) -> bool:
    """Whether a gain is expected to hold between the cells."""
    return around is not None and around.upper < 0.0


def _is_likely(here: Standing, around: Estimate | None) -> bool:
    """Whether the contests here and those around them say that a choice gains, proved here or not."""
    return here.log_ratio < 0.0 and around is not None and around.upper < -math.log1p(MINIMUM_GAIN)
