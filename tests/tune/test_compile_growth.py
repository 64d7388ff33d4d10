"""Growing trees over cells whose verdicts are made up: each is served by what is acceptable there, in few buckets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import MISS, Cell
from layerzero_tune.compile.edge import edge_at
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import Entry, Leaf, Tree
from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.split import MIN_STEP, Place
from layerzero_tune.compile.tree import TreeGrower
from tests.tune.synthetic_results import ALL_KERNELS, DEVICE, norm
from tests.tune.trees import edges

DEFAULT: Choice = ("torch.rms_norm", "{}")
LEAN: Choice = ("synthetic.lean", "{}")
WIDE: Choice = ("synthetic.wide", "{}")

CHOICES = (DEFAULT, LEAN, WIDE)


def verdict_at(sizes: tuple[int, ...], acceptable: frozenset[Choice]) -> Verdict:
    gain, loss = Standing(-0.3, -0.4, -0.2, 10), Standing(0.3, 0.2, 0.4, 10)
    standings = {choice: gain if choice in acceptable else loss for choice in CHOICES}
    standings[DEFAULT] = Standing(0.0, 0.0, 0.0, 10)
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


def in_doubt(sizes: tuple[int, ...], log_ratio: float, half: float) -> Cell:
    """A cell with a gain of `lean` that the surroundings make likely, or that is proved."""
    standings = {
        DEFAULT: Standing(0.0, 0.0, 0.0, 10),
        LEAN: Standing(log_ratio, log_ratio - half, log_ratio + half, 10),
    }
    acceptable = frozenset({LEAN}) if standings[LEAN].is_gain else frozenset({DEFAULT, LEAN})
    return Cell(sizes, replace(verdict_at(sizes, acceptable), standings=standings, best=LEAN))


def test_a_gain_in_doubt_is_served_where_the_cells_of_the_bucket_prove_it_together() -> None:
    tree = grown([in_doubt((16, 1024), -0.3, 0.01), in_doubt((64, 1024), -0.015, 0.02)])
    assert isinstance(tree, Leaf)
    assert [step.choice for step in tree.chain] == [LEAN]


def test_a_gain_in_doubt_is_left_to_the_default_where_they_do_not() -> None:
    tree = grown([in_doubt((16, 1024), -0.02, 0.008), in_doubt((64, 1024), -0.012, 0.03)])
    assert [leaf_at(tree, (rows, 1024)).chain[0].choice for rows in (16, 64)] == [LEAN, DEFAULT]


def test_the_split_is_the_one_after_which_the_fewest_buckets_follow() -> None:
    """A corner of the region is two edges and three buckets; the cheapest first split is over the product."""
    found = [
        Cell(sizes, verdict_at(sizes, frozenset({LEAN if min(sizes[0] / 16, sizes[1] / 1024) >= 1 else DEFAULT})))
        for sizes in itertools.product((1, 4, 16, 64), (256, 512, 1024, 2048))
    ]
    tree = grown(found)
    check_tree(tree, found)
    assert sorted(axes for axes, _ in edges(tree)) == [(0,), (1,)]


@pytest.mark.parametrize("leads", [(0.3, 0.3 - 1e-9), (0.3, 0.29)])
def test_an_edge_stays_between_the_cells_that_it_parts(leads: tuple[float, float]) -> None:
    """Also where the leads meet far away, or beyond every number."""
    cells = []
    for rows, lead in zip((16, 64), leads, strict=True):
        verdict = verdict_at((rows, 1024), frozenset({DEFAULT if rows == 16 else LEAN}))
        standings = {DEFAULT: Standing(0.0, 0.0, 0.0, 10), LEAN: Standing(lead, lead, lead, 10)}
        cells.append(Cell((rows, 1024), replace(verdict, standings=standings, best=DEFAULT)))
    assert edge_at(cells, Place((0, 1), 16 * 1024, 64 * 1024, (DEFAULT, LEAN), True)) == 64 * 1024 - 1


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
