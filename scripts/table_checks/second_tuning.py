"""A second, independent tuning beside the first: what their tables pick on the held-out shapes, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from agreement import tuning
from removed_buckets import Contests, efficiency

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.judge import Choice
from layerzero_tune.evaluate.agreement import agreement
from layerzero_tune.measure.statistics import geometric_mean
from layerzero_tune.results.measurement import Measurement
from table_checks.condition import Condition

TIED = 0.98
REGRET_WITHIN = 0.005


def second_tuning_conditions(
    first: Sequence[Measurement], second: Sequence[Measurement], held_out: Contests
) -> Iterator[Condition]:
    contexts = list(held_out)
    one, other = tuning(first, contexts), tuning(second, contexts)
    found = agreement(one, other, contexts)
    print(f"second tuning: the same plan on {found.same:.1%} of {found.shapes} held-out shapes")
    yield Condition.at_least("second tuning: the same plan or a tied one", found.tied, TIED)
    efficiencies = [_efficiencies(each.picks, held_out) for each in (one, other)]
    timed = [context for context in contexts if all(context in of for of in efficiencies)]
    yield Condition.at_most("second tuning: shapes on which a pick has no time", len(contexts) - len(timed), 0)
    of_first, of_second = (geometric_mean([of[context] for context in timed]) for of in efficiencies)
    print(f"efficiency on the held-out shapes: {of_first:.4f}, of the second tuning {of_second:.4f}")
    yield Condition.at_most("second tuning: difference of the two", abs(of_first - of_second), REGRET_WITHIN)


def _efficiencies(picks: Mapping[SelectionContext, Choice], held_out: Contests) -> Mapping[SelectionContext, float]:
    found = ((context, efficiency(held_out[context], choice)) for context, choice in picks.items())
    return {context: value for context, value in found if value is not None}
