"""The portfolio: the fewest configurations that serve the cells of a static key within 1% of their best.

Kernels compile once for each configuration when it is first used, and again for each static key. Neighbouring cells
often prefer different configurations by less than a clock can tell; a table that follows them all costs its users
seconds of compilation for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.measure.statistics import LOG_RESOLUTION

# How much slower than its best acceptable choice a cell may become.
MAX_LOSS = 0.01


def candidates(verdicts: Sequence[Verdict]) -> tuple[Choice, ...]:
    """The choices that a table over these cells may give, ascending: the default, the portfolio, and what else
    is among the best somewhere of the kernels with one configuration."""
    tuned = _tuned_kernels(verdicts)
    found = {choice for verdict in narrow(verdicts) for choice in verdict.acceptable}
    found |= {choice for verdict in verdicts for choice in verdict.tied if choice[0] not in tuned}
    default = verdicts[0].default
    if any(default in verdict.standings for verdict in verdicts):
        found.add(default)
    return tuple(sorted(found))


def narrow(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts of one static key, with what is acceptable narrowed to a portfolio.

    A kernel that was measured in one configuration here is not touched: it is compiled once, whatever it serves. So
    cells that accept such a kernel ask for no configuration. The others are covered greedily (Chvatal 1979: at most
    ln n + 1 times the fewest), then every member that the others make superfluous is dropped. A configuration covers a
    cell that accepts it, or where it is proved to gain and within `MAX_LOSS` of the best one that the cell accepts.
    """
    tuned = _tuned_kernels(verdicts)
    if not tuned:
        return tuple(verdicts)
    costs = {
        cell: {
            choice: loss
            for choice in verdict.standings
            if choice[0] in tuned and (loss := _loss(verdict, choice)) is not None
        }
        for cell, verdict in enumerate(verdicts)
        if all(choice[0] in tuned for choice in verdict.acceptable)
    }
    portfolio = _without_superfluous(_greedy_cover(costs), costs)
    return tuple(
        replace(
            verdict,
            acceptable=frozenset(c for c in verdict.acceptable if c[0] not in tuned or c in portfolio)
            or frozenset(choice for choice in costs[cell] if choice in portfolio),
        )
        for cell, verdict in enumerate(verdicts)
    )


def _tuned_kernels(verdicts: Sequence[Verdict]) -> frozenset[str]:
    """The kernels with a time in more than one configuration."""
    choices = {choice for verdict in verdicts for choice in verdict.standings}
    kernels = [kernel_id for kernel_id, _ in choices]
    return frozenset(kernel_id for kernel_id in kernels if kernels.count(kernel_id) > 1)


def _loss(verdict: Verdict, choice: Choice) -> float | None:
    """Log time that a cell loses by a choice in place of its best acceptable one; None where it may not serve."""
    standing = verdict.standings[choice]
    best = min(verdict.standings[other].log_ratio for other in verdict.acceptable)
    loss = max(0.0, standing.log_ratio - best)
    if choice in verdict.acceptable:
        return loss
    is_safe = standing.rounds > 0 and (verdict.gains(choice) or verdict.reference != verdict.default)
    return loss if is_safe and loss <= math.log1p(MAX_LOSS) else None


def _greedy_cover(costs: Mapping[int, Mapping[Choice, float]]) -> list[Choice]:
    """Choices that cover all cells: in turn the one that covers the most of those left, of equal ones the one that
    costs them least, then the first by name."""
    left = set(costs)
    found: list[Choice] = []
    while left:
        gained: dict[Choice, list[float]] = {}
        for cell in sorted(left):
            for choice, loss in costs[cell].items():
                gained.setdefault(choice, []).append(loss)
        chosen = min(gained, key=lambda c: (-len(gained[c]), round(math.fsum(gained[c]) / LOG_RESOLUTION), c))
        found.append(chosen)
        left -= {cell for cell in left if chosen in costs[cell]}
    return found


def _without_superfluous(cover: Sequence[Choice], costs: Mapping[int, Mapping[Choice, float]]) -> Set[Choice]:
    kept = set(cover)
    for choice in cover:  # the first ones cover the most, but later ones may have made up for them
        others = kept - {choice}
        if all(not others.isdisjoint(found) for found in costs.values()):
            kept = others
    return kept
