"""Ranges by name: what two have in common, with and without products, and sizes inside."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.diff.ranges import Ranges, common, complete, concise, holds, sizes_inside

ALL_SIZES = [{"rows": rows, "width": width} for rows, width in itertools.product(range(1, 13), range(1, 13))]


def bounds(largest: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(*[st.integers(1, largest)] * 2).map(lambda pair: (min(pair), max(pair)))


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    box = {"rows": draw(bounds(12)), "width": draw(bounds(12))}
    product = draw(st.none() | bounds(144))
    return box if product is None else box | {"rows * width": product}


def held(found: Ranges) -> list[dict[str, int]]:
    return [sizes for sizes in ALL_SIZES if holds(found, sizes)]


@given(ranges(), ranges())
def test_what_two_have_in_common_is_what_both_hold(first: Ranges, second: Ranges) -> None:
    found = common(first, second)
    both = [sizes for sizes in held(first) if sizes in held(second)]
    assert ([] if found is None else held(found)) == both


@given(ranges())
def test_products_that_the_axes_imply_may_be_said_or_not(found: Ranges) -> None:
    told = complete(found, ["rows * width"])
    assert "rows * width" in told
    assert held(told) == held(found)
    assert held(concise(told)) == held(found)
    assert concise(complete({"rows": (2, 3), "width": (4, 5)}, ["rows * width"])) == {"rows": (2, 3), "width": (4, 5)}


@given(ranges())
def test_sizes_inside_are_inside(found: Ranges) -> None:
    sizes = sizes_inside(found)
    assert sizes is None or holds(found, sizes)
    if "rows * width" not in found:
        assert sizes is not None


def test_sizes_inside_a_product_lie_on_the_diagonal_of_the_box() -> None:
    assert sizes_inside({"rows": (1, 1024), "width": (64, 4096)}) == {"rows": 32, "width": 512}
    found = sizes_inside({"rows": (1, 1024), "width": (64, 4096), "rows * width": (64, 1000)})
    assert found is not None
    assert found["rows"] * found["width"] <= 1000
    assert sizes_inside({"rows": (7, 7), "width": (5, 6), "rows * width": (36, 41)}) is None
