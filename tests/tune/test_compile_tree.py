"""Trees: edges near the true crossing, ties broken for stability, every cell served by what was proved there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.feature import feature_name
from layerzero_tune.compile.form import Entry
from layerzero_tune.compile.judge import Choice
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import (
    CostModel,
    Times,
    compiled,
    cross,
    grid,
    measured,
    norm,
    served,
    table_of,
)
from tests.tune.trees import edges

ROWS = (1, 4, 16, 64, 256, 1024)
DEFAULT: Choice = ("torch.rms_norm", "{}")
LEAN: Choice = ("synthetic.lean", "{}")
WIDE: Choice = ("synthetic.wide", "{}")


def wins_above(
    crossing: float, *fields: str, rival: str = "synthetic.lean", default: str = "torch.rms_norm"
) -> CostModel:
    """The rival is faster where the product of these fields is above the crossing, by the root of its share."""

    def model(context: SelectionContext) -> Times:
        product = math.prod(getattr(context, field) for field in fields)
        return {default: 1e6, rival: 1e6 * math.sqrt(crossing / product)}

    return model


def entry_of(rows: Sequence[Measurement]) -> Entry:
    (entry,) = compiled(rows).entries
    return entry


def kernels(entry: Entry) -> list[str]:
    return [leaf.chain[0].choice[0] if leaf.chain else "miss" for leaf in entry.leaves()]


@pytest.mark.parametrize("crossing", [7, 30, 100, 500])
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.001), (0.01, 0.05), (0.03, 0.12)])
def test_an_edge_on_one_axis_lies_at_the_crossing(crossing: int, noise: float, tolerance: float) -> None:
    entry = entry_of(measured(grid(norm, ROWS, (1024,)), wins_above(crossing, "rows"), noise))
    ((axes, edge),) = edges(entry.tree)
    assert axes == (0,)
    assert abs(math.log(edge / crossing)) <= tolerance + 1 / crossing
    assert kernels(entry) == ["torch.rms_norm", "synthetic.lean"]


def test_axes_that_decide_nothing_disappear() -> None:
    contexts = grid(cross, (8, 32, 128), (1, 16), (64, 256, 1024, 4096))
    rows = measured(contexts, wins_above(500, "seq_len_k", rival="synthetic.fused", default="torch.sdpa"), 0.01)
    entry = entry_of(rows)
    ((feature, edge),) = edges(entry.tree)
    assert feature_name(feature, entry.axes) == "seq_len_k"
    assert edge == pytest.approx(500, rel=0.05)


def test_a_crossing_of_products_is_one_edge() -> None:
    """Kernels that differ by the work in a call cross along a line that runs across the axes."""
    model = wins_above(3e5, "rows", "hidden_size")
    entry = entry_of(measured(grid(norm, ROWS, (512, 1024, 2048, 4096)), model, 0.02))
    ((axes, edge),) = edges(entry.tree)
    assert axes == (0, 1)
    assert edge == pytest.approx(3e5, rel=0.05)
    assert kernels(entry) == ["torch.rms_norm", "synthetic.lean"]


@pytest.mark.parametrize("fields", [("batch_kv_heads", "seq_len_k"), ("batch_kv_heads", "seq_len_q", "seq_len_k")])
def test_of_three_axes_those_are_multiplied_that_decide(fields: tuple[str, ...]) -> None:
    contexts = grid(cross, (4, 16, 64), (1, 8, 32), (64, 256, 1024, 4096))
    crossing = {2: 7000.0, 3: 50000.0}[len(fields)]
    model = wins_above(crossing, *fields, rival="synthetic.fused", default="torch.sdpa")
    entry = entry_of(measured(contexts, model, 0.01))
    ((feature, edge),) = edges(entry.tree)
    assert feature_name(feature, entry.axes) == " * ".join(fields)
    assert edge == pytest.approx(crossing, rel=0.05)


def test_an_edge_on_one_axis_is_preferred_to_one_over_a_product() -> None:
    """Both tell the cells apart."""
    model = wins_above(30, "rows")
    ((axes, _),) = edges(entry_of(measured(grid(norm, (8, 64), (512, 1024)), model)).tree)
    assert axes == (0,)


def test_what_was_measured_is_served_by_a_proved_choice_on_three_axes() -> None:
    """Winners that change from point to point: the best, or the default where the gain does not hold around it."""
    contexts = grid(cross, (4, 16, 64), (1, 8, 64), (64, 256, 1024, 4096))

    def model(context: SelectionContext) -> Times:
        sizes = operation_named(context.operation).sizes(context)
        winner = ("torch.sdpa", "synthetic.fused", "synthetic.bounded")[(sum(map(int.bit_length, sizes)) // 3) % 3]
        legal = min(sizes[1:]) >= 20 and max(sizes[1:]) <= 600
        times = {"torch.sdpa": 1000.0, "synthetic.fused": 1000.0} | ({"synthetic.bounded": 1000.0} if legal else {})
        return {name: time / 2 if name == winner else time for name, time in times.items()}

    table = table_of(compiled(measured(contexts, model, 0.03)))
    for context in contexts:
        times = {kernel_id: float(time) for kernel_id, time in model(context).items()}
        assert times[served(table, context) or ""] in (min(times.values()), times["torch.sdpa"])


def test_a_default_that_always_fails_leaves_the_fastest_everywhere() -> None:
    def model(context: SelectionContext) -> Times:
        assert context.rows is not None
        return {"torch.rms_norm": "failed", "synthetic.lean": 1000.0, "synthetic.wide": 1e5 / context.rows}

    entry = entry_of(measured(grid(norm, ROWS, (1024,)), model, 0.01))
    assert kernels(entry) == ["synthetic.lean", "synthetic.wide"]
    ((_, edge),) = edges(entry.tree)
    assert edge == pytest.approx(100, rel=0.05)
    evidence = entry.leaves()[0].evidence
    assert evidence is not None
    assert evidence.speedup is None
    assert evidence.runner_up == "synthetic.wide"


def test_neighbours_with_one_plan_are_merged() -> None:
    """A pair of equal cells in the middle is where an even split would cut."""
    winners = dict(zip((1, 4, 16, 64, 256, 1024), "ddlldd", strict=True))

    def model(context: SelectionContext) -> Times:
        assert context.rows is not None
        return {"torch.rms_norm": 1000.0, "synthetic.lean": 500.0 if winners[context.rows] == "l" else 2000.0}

    entry = entry_of(measured(grid(norm, ROWS, (512, 1024)), model))
    assert kernels(entry) == ["torch.rms_norm", "synthetic.lean", "torch.rms_norm"]
    evidence = entry.leaves()[1].evidence
    assert evidence is not None
    assert sorted(evidence.points) == [(16, 512), (16, 1024), (64, 512), (64, 1024)]
    assert evidence.speedup == pytest.approx(2.0)
    assert evidence.margin == pytest.approx(1.0)
    assert evidence.rounds == 40
