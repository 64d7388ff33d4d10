"""The cover: every cell is served, every hole missed, each bucket cut as far as its cells vouch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.cover import Cover, Covered, Cutter, Parted, cover_of, is_served_at
from layerzero_tune.compile.coverage import bounds_of, max_product_of, unmeasured_cells
from layerzero_tune.compile.foreseen import Foreseen, foreseen_sizes
from layerzero_tune.compile.form import Evidence, Leaf, Split, Step, leaves_of
from layerzero_tune.compile.region import Region

NOTHING = Foreseen((), ())
LINES = st.lists(st.integers(1, 4096), min_size=1, max_size=6, unique=True)


def boxes(cover: Cover) -> int:
    return 1 if isinstance(cover, Covered) else boxes(cover.low) + boxes(cover.high)


def leaf(region: Region, kernel_id: str, points: Sequence[Sizes]) -> Leaf:
    evidence = Evidence(tuple(points), 2.0, 1.9, None, None, 10, "2026-03-01T00:00:00+00:00")
    return Leaf(region, (Step((kernel_id, "{}")),), evidence)


@st.composite
def scattered(draw: st.DrawFn) -> list[Sizes]:
    """Cells of a grid, with some crossings left out."""
    crossings = list(itertools.product(sorted(draw(LINES)), sorted(draw(LINES))))
    return sorted(draw(st.lists(st.sampled_from(crossings), min_size=1, unique=True)))


@settings(deadline=None)
@given(scattered())
def test_every_cell_is_served_and_every_hole_missed(cells: list[Sizes]) -> None:
    largest = max_product_of(cells, (0, 1))
    holes = unmeasured_cells(cells, (0, 1), largest)
    foreseen = foreseen_sizes(cells, holes, (0, 1), bounds_of(cells), largest)
    cover = cover_of(cells, foreseen, holes, (0, 1))
    assert all(is_served_at(cover, cell) for cell in cells)
    assert not any(is_served_at(cover, hole) for hole in holes)


def test_without_holes_there_is_one_box() -> None:
    assert cover_of([(1, 1), (4, 4)], Foreseen(((2, 2),), ()), (), (0, 1)) == Covered(True)


def test_what_is_served_ends_where_the_cells_cease_to_vouch() -> None:
    """A cell vouches for sizes within a factor of four; in between lie holes."""
    cover = cover_of([(1,), (100,)], NOTHING, [(10,)], (0,))
    assert [is_served_at(cover, (size,)) for size in (1, 4, 5, 24, 25, 100)] == [True, True, False, False, True, True]
    # Where that is not told, with the last place that is known to be served.
    cover = cover_of([(100,)], Foreseen(((110,), (120,)), ()), [(300,)], (0,))
    assert [is_served_at(cover, (size,)) for size in (100, 120, 121, 300)] == [True, True, False, False]


def test_a_few_foreseen_sizes_are_worth_no_box() -> None:
    cells = [(16,), (1024,)]
    beside = tuple((size,) for size in (100, 110))
    assert boxes(cover_of(cells, Foreseen((), beside), (), (0,))) == 1
    many = tuple((size,) for size in range(100, 160))
    assert boxes(cover_of(cells, Foreseen((), many), (), (0,))) == 3


def test_a_bucket_that_a_hole_parts_keeps_its_plan_and_all_of_its_cells() -> None:
    """Above 50 another bucket serves: none of its known places lies in the upper box of the first axis."""
    region = Region(((1, 64), (1, 100)), (0, 1))
    cells = [(1, 1), (64, 1), (1, 100)]
    low, high = region.divided((1,), 50)
    tree = Split((1,), 50, leaf(low, "one", cells[:2]), leaf(high, "other", cells[2:]))
    cover = Parted(0, 4, Covered(True), Parted(0, 15, Covered(False), Covered(True)))
    found = list(leaves_of(Cutter(lambda each: True).cut_out(tree, cover, region, np.array(cells))))
    assert [(each.region.box, [step.choice[0] for step in each.chain]) for each in found] == [
        (((1, 4), (1, 50)), ["one"]),
        (((1, 4), (51, 100)), ["other"]),
        (((5, 15), (1, 100)), []),
        (((16, 64), (1, 100)), ["one"]),
    ]
    assert found[0].evidence == found[3].evidence


def test_boxes_side_by_side_that_are_served_alike_are_one_leaf() -> None:
    region = Region(((1, 64),), (0,))
    cover = Parted(0, 4, Covered(True), Parted(0, 15, Covered(True), Covered(False)))
    found = Cutter(lambda each: True).cut_out(leaf(region, "one", [(1,)]), cover, region, np.array([(1,), (8,)]))
    assert [each.region.box for each in leaves_of(found)] == [((1, 15),), ((16, 64),)]


def test_a_part_without_a_place_stays_where_what_lies_beside_it_is_illegal() -> None:
    """A range limit divides the bucket at 50: the plan below must not serve above, however little lies there."""
    region = Region(((1, 64), (1, 100)), (0, 1))
    low, high = region.divided((1,), 50)
    tree = Split((1,), 50, leaf(low, "narrow", [(1, 1)]), leaf(high, "other", [(1, 100)]))
    cutter = Cutter(lambda each: each.chain[0].choice[0] != "narrow" or each.region.box[1][1] <= 50)
    found = list(leaves_of(cutter.cut_out(tree, Covered(True), region, np.array([(1, 1), (8, 8)]))))
    assert [(each.region.box[1], each.chain[0].choice[0]) for each in found] == [
        ((1, 50), "narrow"),
        ((51, 100), "other"),
    ]
    alike = Split((0,), 4, leaf(region.divided((0,), 4)[0], "narrow", [(1, 1)]), tree.high)
    assert (
        len(list(leaves_of(Cutter(lambda each: True).cut_out(alike, Covered(True), region, np.array([(1, 1)]))))) == 1
    )


def test_a_cell_that_lies_far_off_on_another_axis_vouches_for_nothing() -> None:
    beside = ((64, 4096), (100, 4096), (1024, 4096))
    cover = cover_of([(1024, 1), (300, 4096)], Foreseen(beside, ()), [(64, 1)], (0, 1))
    assert [is_served_at(cover, (size, 1)) for size in (64, 75, 255, 256)] == [False, False, False, True]


def three_axes(draw: st.DrawFn) -> list[Sizes]:
    crossings = list(itertools.product(*(sorted(draw(LINES))[:4] for _ in range(3))))
    return sorted(draw(st.lists(st.sampled_from(crossings), min_size=1, unique=True)))


@settings(deadline=None, max_examples=50)
@given(st.composite(three_axes)())
def test_on_three_axes_no_cell_is_missed_and_no_hole_served(cells: list[Sizes]) -> None:
    largest = max_product_of(cells, (0, 1, 2))
    holes = unmeasured_cells(cells, (0, 1, 2), largest)
    cover = cover_of(cells, foreseen_sizes(cells, holes, (0, 1, 2), bounds_of(cells), largest), holes, (0, 1, 2))
    assert all(is_served_at(cover, cell) for cell in cells)
    assert not any(is_served_at(cover, hole) for hole in holes)
