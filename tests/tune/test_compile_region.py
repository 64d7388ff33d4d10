"""Regions: every split sets all sizes apart, and no box is wider than the products beside it allow."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.compile.feature import Axes, factors_of, feature_at, span
from layerzero_tune.compile.region import Region

AXES = st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
SPLITS = st.lists(st.tuples(AXES, st.floats(0.0, 1.0), st.booleans()), max_size=5)
BOX = ((1, 9), (3, 12), (2, 7))
ALL_SIZES = tuple(itertools.product(*(range(low, high + 1) for low, high in BOX)))


def edge_in(region: Region, axes: Axes, share: float) -> int:
    """An edge that the product over the axes crosses in the region's box."""
    low, high = (math.prod(region.box[axis][side] for axis in axes) for side in (0, 1))
    return low + round(share * (high - low))


@given(SPLITS)
def test_a_region_holds_the_sizes_that_its_splits_leave(splits: list[tuple[Axes, float, bool]]) -> None:
    region, left = Region(BOX, (0, 1, 2)), set(ALL_SIZES)
    for axes, share, takes_low in splits:
        edge = edge_in(region, axes, share)
        region = region.divided(axes, edge)[not takes_low]
        left = {sizes for sizes in left if (feature_at(sizes, axes) <= edge) == takes_low}
        assert {sizes for sizes in ALL_SIZES if region.holds(sizes)} == left
        if region.is_empty:
            assert not left
            return


@given(SPLITS)
def test_what_is_said_of_products_is_not_said_by_the_box(splits: list[tuple[Axes, float, bool]]) -> None:
    region = Region(BOX, (0, 1, 2))
    for axes, share, takes_low in splits:
        region = region.divided(axes, edge_in(region, axes, share))[not takes_low]
        if region.is_empty:
            return
    for feature, (low, high) in region.beside:
        assert factors_of(feature) > 1
        least, most = span(feature, dict(enumerate(region.box)))
        assert least <= low <= high <= most
        assert (low, high) != (least, most)


def test_a_region_without_a_product_left_is_empty() -> None:
    low, _ = Region(BOX, (0, 1, 2)).divided((0, 1, 2), 381)
    assert low.divided((0, 1, 2), 381)[1].is_empty


def test_a_product_narrows_the_box_on_both_sides() -> None:
    region = Region(((1, 1024), (64, 4096)), (0, 1))
    low, high = region.divided((0, 1), 8192)
    assert (low.box, low.beside) == (((1, 128), (64, 4096)), (((0, 1), (64, 8192)),))
    assert (high.box, high.beside) == (((3, 1024), (64, 4096)), (((0, 1), (8193, 1024 * 4096)),))
    wide, _ = high.divided((1,), 512)
    assert wide.box == ((17, 1024), (64, 512))
    assert not high.divided((0,), 2)[1].is_empty
    assert high.divided((0,), 2)[0].is_empty


def test_a_tied_axis_follows_the_one_before_it() -> None:
    region = Region(((1, 64), (16, 512), (16, 512)), (0, 1))
    low, high = region.divided((1,), 100)
    assert low.box == ((1, 64), (16, 100), (16, 100))
    assert high.box == ((1, 64), (101, 512), (101, 512))
    across, _ = region.divided((0, 1), 320)
    assert across.box == ((1, 20), (16, 320), (16, 320))
