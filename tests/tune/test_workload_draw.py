"""Held-out shapes: new calls between measured neighbours, the same ones for the same seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.workload.draw import NEIGHBOUR_FACTOR, draw_between
from layerzero_tune.workload.errors import WorkloadError
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import compiled, cross, full, grid, norm, served, table_of

MEASURED = tuple({row.context: None for row in recorded_rows()})


def key_of(context: SelectionContext) -> tuple[object, ...]:
    operation = operation_named(context.operation)
    return (operation.name, operation.static_key(context))


def check_between_neighbours(context: SelectionContext, measured: tuple[SelectionContext, ...]) -> None:
    """Two measured points of the key, neighbours on every axis, enclose the context and its product."""
    operation = operation_named(context.operation)
    sizes = operation.sizes(context)
    points = [operation.sizes(point) for point in measured if key_of(point) == key_of(context)]
    assert sizes not in points
    assert any(
        all(
            min(a, b) <= size <= max(a, b) <= NEIGHBOUR_FACTOR * min(a, b)
            for a, b, size in zip(first, second, sizes, strict=True)
        )
        and math.prod(sizes) <= max(math.prod(first), math.prod(second))
        for first in points
        for second in points
    )


def test_shapes_are_new_calls_between_what_was_measured() -> None:
    drawn = draw_between(MEASURED, 200, seed=1)
    assert len(set(drawn)) == len(drawn) == 200
    assert not set(drawn) & set(MEASURED)
    for context in drawn:
        operation_named(context.operation).validate(context)
        check_between_neighbours(context, MEASURED)


def test_shapes_are_spread_evenly_over_the_keys() -> None:
    keys = {key_of(context) for context in MEASURED}
    counts = Counter(map(key_of, draw_between(MEASURED, 2 * len(keys) + 5, seed=0)))
    assert counts.keys() == keys
    assert set(counts.values()) == {2, 3}


def test_hidden_sizes_are_multiples_of_64_and_heads_are_split_anew() -> None:
    drawn = draw_between(MEASURED, 200, seed=2)
    widths = {context.hidden_size for context in drawn if context.hidden_size}
    assert len(widths) > 10
    assert all(width % 64 == 0 for width in widths)
    heads = {(context.num_heads, context.num_kv_heads) for context in drawn if context.num_heads}
    assert len(heads) > 5
    assert {q // (kv or 1) for q, kv in heads} == {4}
    odd = draw_between(grid(norm, (1, 16), (100, 1000)), 20, seed=0)
    assert any((context.hidden_size or 0) % 64 for context in odd), "sizes that were odd already stay so"


def test_equal_seeds_draw_equal_shapes_whatever_the_order() -> None:
    shuffled = [*MEASURED, *MEASURED[:7]]
    random.Random(3).shuffle(shuffled)
    assert draw_between(shuffled, 48, seed=5) == draw_between(MEASURED, 48, seed=5)
    assert draw_between(MEASURED, 48, seed=6) != draw_between(MEASURED, 48, seed=5)


def test_a_table_answers_nearly_all_of_them() -> None:
    """The tables of a preset know what lies between its points: 98% here, 95% is asked of a release."""
    table = table_of(compiled(recorded_rows()))
    drawn = draw_between(MEASURED, 400, seed=0)
    assert sum(served(table, context) is not None for context in drawn) >= 0.98 * len(drawn)


@pytest.mark.parametrize(
    ("measured", "count", "fitting"),
    [
        ([norm(4), norm(6), full(8, 64)], 5, 1),
        ([norm(4), full(8, 64)], 1, 0),
        ([norm(1, 64), norm(1, 64 * 17)], 1, 0),
        ([], 1, 0),
    ],
)
def test_without_room_between_points_the_error_says_how_many_fit(
    measured: list[SelectionContext], count: int, fitting: int
) -> None:
    with pytest.raises(WorkloadError, match=f"only {fitting} of {count} shapes fit between"):
        draw_between(measured, count, seed=0)


def test_lengths_that_would_make_another_operation_are_not_drawn() -> None:
    drawn = draw_between(grid(cross, (4, 8), (20, 24), (22, 26)), 60, seed=0)
    assert all(context.seq_len_q != context.seq_len_k for context in drawn)
    chunks = [
        replace(cross(4, q, k), operation="attention.causal", causal_alignment="bottom_right")
        for q in (20, 24)
        for k in (22, 26)
    ]
    assert {context.causal_geometry for context in draw_between(chunks, 30, seed=0)} == {"bottom_right"}


def test_where_both_sizes_are_large_nothing_is_drawn_beyond_the_measured_products() -> None:
    drawn = draw_between([norm(1, 4096), norm(16, 256)], 30, seed=0)
    assert max((context.rows or 0) * (context.hidden_size or 0) for context in drawn) <= 4096
    assert len({context.rows for context in drawn}) > 5


def test_a_key_without_room_leaves_the_others_to_be_drawn_from() -> None:
    """Between 4 and 6 rows there is one size."""
    drawn = draw_between([norm(4), norm(6), *grid(full, (8, 64), (64, 512))], 9, seed=0)
    assert Counter(context.operation for context in drawn) == {"norm.rms": 1, "attention.full": 8}


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=5, unique=True)


@settings(deadline=None)
@given(rows=SIZES, widths=SIZES, kv_heads=SIZES, lengths=SIZES, seed=st.integers(0, 9))
def test_any_grid_gives_shapes_between_neighbours_or_says_that_it_cannot(
    rows: list[int], widths: list[int], kv_heads: list[int], lengths: list[int], seed: int
) -> None:
    measured = (*grid(norm, rows, widths), *grid(full, kv_heads, lengths))
    try:
        drawn = draw_between(measured, 10, seed)
    except WorkloadError:
        return
    for context in drawn:
        check_between_neighbours(context, measured)
