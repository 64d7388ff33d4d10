"""A second, independent tuning beside the first: what their tables pick on the held-out shapes, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agreement import alike_by

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.compile.judge import choice_described
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.evaluate.agreement import Tuning, agreement
from layerzero_tune.measure.statistics import geometric_mean
from layerzero_tune.results.measurement import Measurement
from table_checks.condition import Condition

SECOND = "second"
TIED = 0.98
REGRET_WITHIN = 0.005


def second_tuning_conditions(
    evaluation: Mapping[str, Any], first: Sequence[Measurement], second: Sequence[Measurement]
) -> Iterator[Condition]:
    """`evaluation` has the second's table beside the first's; the rows are what they were compiled from."""
    places = [place for place, other in enumerate(evaluation["beside"]) if other["name"] == SECOND]
    yield Condition.at_least("second tuning: tables evaluated beside the first", len(places), 1)
    if not places:
        return
    shapes = evaluation["shapes"]
    others = [shape["beside"][places[0]] for shape in shapes]
    contexts = [SelectionContext(**shape["context"]) for shape in shapes]
    found = agreement(_tuning(first, contexts, shapes), _tuning(second, contexts, others), contexts)
    print(f"second tuning: the same plan on {found.same:.1%} of {found.shapes} held-out shapes")
    yield Condition.at_least("second tuning: the same plan or a tied one", found.tied, TIED)
    of_first, of_second = (geometric_mean([pick["efficiency"] for pick in picks]) for picks in (shapes, others))
    print(f"efficiency on the held-out shapes: {of_first:.4f}, of the second tuning {of_second:.4f}")
    yield Condition.at_most("second tuning: difference of the two", abs(of_first - of_second), REGRET_WITHIN)


def _tuning(
    rows: Sequence[Measurement], contexts: Sequence[SelectionContext], picks: Sequence[Mapping[str, Any]]
) -> Tuning:
    chosen = {context: choice_described(pick["chosen"]) for context, pick in zip(contexts, picks, strict=True)}
    return Tuning(chosen, alike_by(compile_rows(rows, builtin_kernels()).models))
