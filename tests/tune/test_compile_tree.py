"""Trees: edges near the true crossing, ties broken for stability, every cell served by what was proved there."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import MISS, Cell
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import Entry, Leaf, Tree
from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.split import MIN_STEP
from layerzero_tune.compile.tree import TreeGrower
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import (
    ALL_KERNELS,
    DEVICE,
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


def edges(tree: Tree) -> list[tuple[tuple[int, ...], int]]:
    """(axes, edge) of every split, in ascending order of what they separate."""
    if isinstance(tree, Leaf):
        return []
    return [*edges(tree.low), (tree.axes, tree.edge), *edges(tree.high)]


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
    (((axis,), edge),) = edges(entry.tree)
    assert entry.axes[axis] == "seq_len_k"
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
    ((axes, edge),) = edges(entry.tree)
    assert [entry.axes[axis] for axis in axes] == list(fields)
    assert edge == pytest.approx(crossing, rel=0.05)


def test_an_edge_on_one_axis_is_preferred_to_one_over_a_product() -> None:
    """Both tell the cells apart."""
    model = wins_above(30, "rows")
    ((axes, _),) = edges(entry_of(measured(grid(norm, (1, 1024), (512, 1024)), model)).tree)
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


# Trees over cells whose verdicts are made up.

CHOICES = (DEFAULT, LEAN, WIDE)


def verdict_at(sizes: tuple[int, ...], acceptable: frozenset[Choice]) -> Verdict:
    standings = {choice: Standing(0.0 if choice in acceptable else 0.3, 0.0, 0.4, 10) for choice in CHOICES}
    best = min(acceptable)
    return Verdict(
        norm(*sizes),
        sizes,
        standings,
        DEFAULT,
        DEFAULT,
        best,
        acceptable,
        acceptable,
        1000.0,
        "2026-03-01T00:00:00+00:00",
    )


def grower() -> TreeGrower:
    kernels = {kernel.kernel_id: kernel for kernel in ALL_KERNELS}
    return TreeGrower(LeafBuilder(operation_named("norm.rms"), norm(1).with_device(DEVICE), kernels, DEFAULT, True))


@pytest.mark.parametrize(
    ("acceptable", "previous", "chosen"),
    [
        ({LEAN, WIDE, DEFAULT}, WIDE, DEFAULT),
        ({LEAN, WIDE}, WIDE, WIDE),
        ({LEAN, WIDE}, DEFAULT, LEAN),
        ({LEAN, WIDE}, None, LEAN),
    ],
)
def test_ties_go_to_the_default_then_the_previous_bucket_then_the_id(
    acceptable: set[Choice], previous: Choice | None, chosen: Choice
) -> None:
    cell = Cell((16, 1024), verdict_at((16, 1024), frozenset(acceptable)))
    leaf = grower().grow([cell], Region(((16, 16), (1024, 1024)), (0, 1)), previous)
    assert isinstance(leaf, Leaf)
    assert [step.choice for step in leaf.chain] == [chosen]


def test_the_bucket_before_is_the_one_in_ascending_order() -> None:
    """Few rows go to `wide`; of many rows the narrow ones tie, and take over what the bucket before them has."""
    acceptable = {(1, 64): {WIDE}, (1, 4096): {WIDE}, (64, 64): {LEAN, WIDE}, (64, 4096): {DEFAULT}}
    tree = grown([Cell(sizes, verdict_at(sizes, frozenset(choices))) for sizes, choices in acceptable.items()])
    assert [step.choice for step in leaf_at(tree, (64, 64)).chain] == [WIDE]


ACCEPTABLE = st.sampled_from(
    [frozenset({DEFAULT}), frozenset({LEAN}), frozenset({WIDE}), frozenset({LEAN, WIDE}), None]
)


# Sizes far enough apart to be told apart.
SEPARABLE = [1]
while SEPARABLE[-1] < 4096:
    SEPARABLE.append(max(SEPARABLE[-1] + 1, math.ceil(SEPARABLE[-1] * MIN_STEP)))


@pytest.mark.parametrize(
    ("at_37", "at_38", "chosen"),
    [
        ({LEAN: -0.2}, {LEAN: -0.2}, LEAN),
        ({LEAN: -0.2}, {LEAN: 0.1}, DEFAULT),
        ({LEAN: -0.2, WIDE: -0.3}, {LEAN: -0.2, WIDE: 0.1}, LEAN),
        ({LEAN: -0.2, WIDE: -0.5}, {LEAN: -0.3, WIDE: -0.2}, WIDE),
    ],
)
def test_neighbouring_sizes_share_a_bucket(
    at_37: dict[Choice, float], at_38: dict[Choice, float], chosen: Choice
) -> None:
    """One choice serves both lengths: the cheapest that gains at both, else the default."""
    found = []
    for rows, log_ratios in ((37, at_37), (38, at_38)):
        standings = {DEFAULT: Standing(0.0, 0.0, 0.0, 10)} | {
            choice: Standing(ratio, ratio - 0.01, ratio + 0.01, 10) for choice, ratio in log_ratios.items()
        }
        best = min(standings, key=lambda choice: (standings[choice].log_ratio, choice))
        sizes = (rows, 64)
        verdict = replace(verdict_at(sizes, frozenset({best})), standings=standings)
        found.append(Cell(sizes, verdict))
    tree = grown(found)
    assert isinstance(tree, Leaf)
    assert tree.chain[0].choice == chosen


@st.composite
def cells(draw: st.DrawFn, columns: int) -> list[Cell]:
    """Cells on a grid of rows and hidden sizes; None is a hole."""
    lines = st.lists(st.sampled_from(SEPARABLE), min_size=1, unique=True)
    rows, widths = draw(lines.filter(lambda found: len(found) < 9)), sorted(draw(lines))[:columns]
    found = []
    for sizes in ((row, width) for row in sorted(rows) for width in widths):
        acceptable = draw(ACCEPTABLE)
        found.append(Cell(sizes, None if acceptable is None else verdict_at(sizes, acceptable)))
    return found


def check_tree(tree: Tree, found: Sequence[Cell]) -> None:
    """Every cell gets a choice that was proved there, every hole misses, and the buckets fill the box once."""
    box = tuple((min(sizes), max(sizes)) for sizes in zip(*(cell.sizes for cell in found), strict=True))
    for cell in found:
        chain = leaf_at(tree, cell.sizes).chain
        assert (chain[0].choice if chain else MISS) in cell.acceptable
    regions = [leaf.region for leaf in Entry("norm.rms", (), (), (0, 1), box, None, tree).leaves()]
    lines = [
        sorted({*bounds, *(edge for region in regions for edge in region.box[axis])}) for axis, bounds in enumerate(box)
    ]
    for sizes in itertools.product(*lines):
        assert [region for region in regions if region.holds(sizes)] == [leaf_at(tree, sizes).region]


def grown(found: Sequence[Cell]) -> Tree:
    box = tuple((min(sizes), max(sizes)) for sizes in zip(*(cell.sizes for cell in found), strict=True))
    return grower().grow(found, Region(box, (0, 1)))


@given(cells(columns=1))
def test_on_one_axis_no_two_neighbours_are_alike(found: list[Cell]) -> None:
    tree = grown(found)
    check_tree(tree, found)
    leaves = Entry("norm.rms", (), (), (0, 1), (), None, tree).leaves()
    assert all(before.chain != after.chain for before, after in pairwise(leaves))


@given(cells(columns=4))
def test_on_two_axes_every_cell_is_served_by_a_proved_choice(found: list[Cell]) -> None:
    check_tree(grown(found), found)
