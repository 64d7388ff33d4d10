"""Scores, summaries and gates, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError, ResultsError
from layerzero_tune.evaluate.gate import FIGURES, Gate
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.evaluate.score import Score, confirms_slower, score
from layerzero_tune.evaluate.summary import Summary, by_operation, summarise
from layerzero_tune.report.wins import kernel_wins
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import Times, contest_rows, full, grid, measured, norm

DEFAULT, FUSED, VECTOR = "torch.rms_norm", "torch.rms_norm.fused", "torch.rms_norm.vector_norm"


def with_rounds(**samples: Sequence[float]) -> list[Measurement]:
    """A contest's rows with these times in its rounds, first to last."""
    names = {"default": DEFAULT, "fused": FUSED, "vector": VECTOR, "public": PUBLIC_CALL}
    rows = contest_rows(norm(8), {names[name]: 1.0 for name in samples})
    return [replace(row, samples_ns=tuple(times)) for row, times in zip(rows, samples.values(), strict=True)]


def test_the_best_is_picked_on_odd_rounds_and_times_are_read_from_even_ones() -> None:
    """`vector` has luck in the odd rounds: it is called the best, and its even rounds are what it then is worth."""
    rows = with_rounds(
        default=(100.0, 100.0, 100.0, 100.0),
        fused=(50.0, 40.0, 50.0, 40.0),
        vector=(30.0, 60.0, 30.0, 60.0),
        public=(10.0, 80.0, 10.0, 80.0),
    )
    found = score(rows, FUSED, hit=True)
    assert found.best == VECTOR
    assert found.efficiency == 60.0 / 40.0
    assert found.speedup == 100.0 / 40.0
    assert found.end_to_end == 100.0 / 80.0
    assert found.default_ns == 100.0
    assert (found.context, found.chosen, found.hit) == (norm(8), FUSED, True)


def test_a_shape_on_which_the_default_was_chosen_is_not_slower_than_it() -> None:
    found = score(with_rounds(default=(100.0, 100.0), fused=(50.0, 50.0)), DEFAULT, hit=False)
    assert (found.efficiency, found.speedup, found.slower_p, found.end_to_end) == (0.5, 1.0, 1.0, None)


def test_the_p_value_is_of_being_more_than_two_percent_slower() -> None:
    base = (100.0, 101.0, 99.0, 100.0, 102.0, 98.0)
    noise = (1.001, 0.999, 1.0005, 0.9995, 1.0, 1.0)

    def p_value(ratio: float) -> float:
        slower = [time * ratio * wobble for time, wobble in zip(base, noise, strict=True)]
        return score(with_rounds(default=base, fused=slower), FUSED, hit=True).slower_p

    assert p_value(1.10) < 1e-6
    assert p_value(1.02) == pytest.approx(0.5, abs=0.01)
    assert p_value(1.0) > 0.999


def test_a_choice_or_default_without_a_time_is_an_error_that_says_why() -> None:
    rows = contest_rows(norm(8), {DEFAULT: 1.0, FUSED: "died"})
    with pytest.raises(ResultsError, match=rf"'{FUSED}' has no time at .*died a recorded died"):
        score(rows, FUSED, hit=True)
    with pytest.raises(ResultsError, match="not in the contest"):
        score(rows, VECTOR, hit=True)
    with pytest.raises(ResultsError, match=rf"'{DEFAULT}' has no time"):
        score(contest_rows(norm(8), {DEFAULT: "timeout", FUSED: 1.0}), FUSED, hit=True)


@pytest.mark.parametrize(("ratio", "confirmed"), [(1.03, True), (1.019, False), (0.9, False)])
def test_a_remeasurement_above_the_threshold_confirms(ratio: float, confirmed: bool) -> None:
    rows = with_rounds(default=[100.0] * 6, fused=[100.0 * ratio] * 6)
    assert confirms_slower(rows, FUSED) == confirmed
    assert not confirms_slower(rows, VECTOR)


def scored(
    context: SelectionContext, efficiency: float, *, hit: bool = True, speedup: float = 1.0, end: float | None = None
) -> Score:
    return Score(context, hit, FUSED, FUSED, 1.0, efficiency, speedup, end, 1.0)


def test_a_summary() -> None:
    scores = [
        scored(norm(1), 0.5, speedup=2.0, end=1.5),
        scored(norm(2), 1.0, speedup=8.0, hit=False),
        scored(norm(3), 0.8, speedup=4.0, end=6.0),
        scored(norm(4), 0.9, speedup=1.0),
    ]
    found = summarise(scores, frozenset({scores[0], scored(norm(9), 0.1)}))
    assert found.n == 4
    assert found.hit_rate == 0.75
    assert found.efficiency_geomean == pytest.approx((0.5 * 1.0 * 0.8 * 0.9) ** 0.25)
    assert found.efficiency_p10 == pytest.approx(0.5 + 0.3 * 0.3)
    assert found.efficiency_min == 0.5
    assert found.speedup_vs_default_geomean == pytest.approx(64.0**0.25)
    assert found.speedup_end_to_end_geomean == pytest.approx(3.0)
    assert found.slower_than_default == 1
    assert summarise(scores[1:2], frozenset()).speedup_end_to_end_geomean is None


def test_scores_are_grouped_by_operation_and_mode() -> None:
    graph = replace(norm(2), mode="graph")
    scores = [scored(context, 1.0) for context in (norm(1), full(4, 64), graph, norm(3))]
    groups = by_operation(scores)
    assert list(groups) == [("attention.full", "eager"), ("norm.rms", "eager"), ("norm.rms", "graph")]
    assert groups["norm.rms", "eager"] == (scores[0], scores[3])


SUMMARY = Summary(10, 0.95, 0.97, 0.9, 0.8, 1.5, None, 0)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("efficiency_geomean>=0.97", None),
        (" hit_rate > 0.95 ", "hit_rate is 0.95, required > 0.95"),
        ("slower_than_default==0", None),
        ("slower_than_default<1", None),
        ("efficiency_min<=7e-1", "efficiency_min is 0.8, required <= 0.7"),
        ("speedup_end_to_end_geomean>=0", "speedup_end_to_end_geomean is None, required >= 0.0"),
    ],
)
def test_gates(text: str, failure: str | None) -> None:
    assert Gate.parse(text).failure(SUMMARY) == failure


@pytest.mark.parametrize(
    "text", ["", "hit_rate", "hit_rate=1", "hit_rate>=", "hit_rate>=high", "hit_rate>=1.2.3", "hit_rate=>1"]
)
def test_a_gate_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ContextError, match="--gate"):
        Gate.parse(text)


def test_a_gate_on_an_unknown_figure_lists_the_known_ones() -> None:
    with pytest.raises(ContextError, match="names 'efficency', allowed: " + ", ".join(FIGURES)):
        Gate.parse("efficency>=1")


def test_where_each_kernel_wins() -> None:
    def model(context: SelectionContext) -> Times:
        assert context.rows is not None
        return {DEFAULT: 1000.0, FUSED: 4000.0 / context.rows, VECTOR: 999.0 if context.rows == 1 else "wrong"}

    rows = measured(grid(norm, (1, 8, 16)), model)
    rows += contest_rows(full(4, 64), {"torch.sdpa": "died", "torch.matmul": 5.0})
    found = kernel_wins(rows)
    assert [(line.kernel_id, line.points, line.wins) for line in found] == [
        ("torch.matmul", 1, 1),
        (DEFAULT, 3, 1),
        (FUSED, 3, 2),
        (VECTOR, 1, 0),
    ]
    assert {(line.operation, line.dtype) for line in found} == {("attention.full", "float32"), ("norm.rms", "float32")}
    gains = [line.largest_gain for line in found]
    assert gains == [None, 1.0, pytest.approx(4.0, rel=1e-6), None], "the dead default of attention has no ratio"
