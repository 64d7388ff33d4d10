"""Coverage: a table misses wherever nothing was measured (contract 3)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_tune.compile.coverage import bounds_of, max_product_of, unmeasured_cells
from layerzero_tune.workload.presets import PRESETS, preset_workload
from tests.tune.synthetic_results import Times, compiled, cross, full, grid, measured, norm, served, table_of


def model(context: SelectionContext) -> Times:
    return {operation_named(context.operation).default_kernel: 1000.0}


def test_bounds_and_products_of_a_grid() -> None:
    whole = list(product((1, 8, 64), (512, 1024)))
    assert bounds_of(whole) == ((1, 64), (512, 1024))
    assert max_product_of(whole, (0, 1)) is None
    assert max_product_of(whole[:-1], (0, 1)) == 64 * 512
    assert max_product_of([(2, 16, 16), (4, 8, 8)], (0, 1)) == 32


def test_holes_of_a_grid() -> None:
    """A cell vouches for sizes within a factor of four on every axis."""
    corners = [(1, 1), (1, 16), (16, 1)]
    assert unmeasured_cells(corners, (0, 1), None) == ((16, 16),)
    assert unmeasured_cells([*corners, (4, 4)], (0, 1), None) == ()
    assert unmeasured_cells([*corners, (3, 16)], (0, 1), None) == ((16, 16),)
    assert unmeasured_cells(corners, (0, 1), 16) == ()
    assert unmeasured_cells(corners, (0, 1), 17) == ((16, 16),)
    assert unmeasured_cells([(1, 1, 1), (16, 16, 16), (1, 16, 16)], (0, 1), None) == ((16, 1, 1),)


def test_lines_that_lie_too_far_apart_have_holes_between_them() -> None:
    assert unmeasured_cells([(1,), (16,)], (0,), None) == ()
    assert unmeasured_cells([(100,), (1701,)], (0,), None) == ((412,),)
    assert unmeasured_cells([(1,), (300,)], (0,), None) == ((7,), (45,))
    assert unmeasured_cells([(128,), (4096,)], (0,), None) == ((768,),), "a multiple of 128, as the others are"
    assert unmeasured_cells([(1, 1), (64, 1), (8, 2)], (0, 1), None) == ()


def test_outside_the_measured_range_a_call_misses() -> None:
    table = table_of(compiled(measured(grid(norm, (4, 16, 64), (512, 1024)), model)))
    assert served(table, norm(4, 512)) == "torch.rms_norm"
    assert served(table, norm(64, 1024)) == "torch.rms_norm"
    for context in (norm(3, 512), norm(65, 512), norm(4, 511), norm(4, 1025), norm(1, 1), norm(10**9, 512)):
        assert served(table, context) is None


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16", "weight_dtype": "bfloat16"},
        {"weight_dtype": "bfloat16"},
        {"mode": "graph"},
        {"offset": 1.0},
        {"has_weight": False},
        {"requires_grad": True},
        {"requires_deterministic": True},
    ],
)
def test_a_feature_that_was_not_measured_misses(change: dict[str, object]) -> None:
    table = table_of(compiled(measured(grid(norm, (4, 64), (512, 1024)), model)))
    assert served(table, norm(16)) == "torch.rms_norm"
    assert served(table, replace(norm(16), **change)) is None  # type: ignore[arg-type]


def test_beyond_the_largest_measured_product_a_call_misses() -> None:
    contexts = [context for context in grid(full, (8, 32, 128), (64, 256, 1024)) if _elements(context) <= 2**15]
    table = table_of(compiled(measured(contexts, model)))
    assert served(table, full(32, 1024)) == "torch.sdpa"
    assert served(table, full(33, 1024)) is None
    assert served(table, full(128, 256)) == "torch.sdpa"
    assert served(table, full(128, 257)) is None
    assert served(table, full(64, 512)) == "torch.sdpa"


def _elements(context: SelectionContext) -> int:
    first, second = operation_named(context.operation).sizes(context)
    return first * second


def test_a_hole_in_the_grid_misses() -> None:
    """Long prefill was measured for few heads, decode for many; many heads with long queries were not."""
    contexts = [
        *grid(cross, (4,), (1, 8, 64), (512, 2048)),
        *grid(cross, (64,), (1,), (512, 2048)),
        cross(1024, 64, 4096),
    ]
    table = table_of(compiled(measured(contexts, model)))
    for context in contexts:
        assert served(table, context) == "torch.sdpa"
    assert served(table, cross(8, 32, 1024)) == "torch.sdpa"
    assert served(table, cross(64, 64, 2048)) is None
    assert served(table, cross(1024, 1, 512)) is None


def test_a_hole_that_reaches_within_the_largest_product_misses_there() -> None:
    """64 x 64 x 1024 lies beyond the largest product; 64 x 48 x 85 within it, but next to nothing that was measured."""
    contexts = [*grid(cross, (4,), (1, 64), (64, 1024)), *grid(cross, (64,), (1,), (64, 1024))]
    table = table_of(compiled(measured(contexts, model)))
    assert served(table, cross(4, 64, 1024)) == "torch.sdpa"
    assert served(table, cross(64, 48, 85)) is None
    assert served(table, cross(64, 2, 512)) == "torch.sdpa"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_no_hole_in_what_it_covers(preset: str) -> None:
    cells: dict[tuple[object, ...], list[SelectionContext]] = {}
    for line in preset_workload(preset, tuple(OPERATIONS)):
        operation = operation_named(line.context.operation)
        cells.setdefault((operation.name, operation.static_key(line.context)), []).append(line.context)
    for (name, _), contexts in cells.items():
        operation = operation_named(str(name))
        free = tuple(operation.axes.index(axis) for axis in operation.axes_of(contexts[0]))
        sizes = [operation.sizes(context) for context in contexts]
        assert unmeasured_cells(sizes, free, max_product_of(sizes, free)) == (), f"{preset} {name}"
