"""The nearest measured bucket of a call that the table misses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_runtime.tables.prior import NearestBuckets
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, emit
from tests.tune.synthetic_results import compiled, grid, measured, norm

CROSSING = 3e5


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory) -> NearestBuckets:
    """Of a table with two buckets, which part at a product of rows and width: their boxes overlap."""

    def times(context: SelectionContext) -> dict[str, float]:
        elements = math.prod(operation_named("norm.rms").sizes(context))
        return {"torch.rms_norm": 1e6, "synthetic.lean": 1e6 * math.sqrt(CROSSING / elements)}

    form = compiled(measured(grid(norm, (1, 4, 16, 64, 256, 1024), (512, 1024, 2048, 4096)), times))
    folder = emit(form).write(tmp_path_factory.mktemp("tables"))
    table = load_table_file(folder / Path(MODULE_FILE))
    (entry,) = table.entries["norm.rms"].values()
    assert len(entry.leaves) == 2
    return NearestBuckets(table)


@pytest.mark.parametrize(
    ("rows", "hidden_size", "preferred"),
    [
        (512, 8192, "synthetic.lean"),  # one octave too wide for both boxes; the product is the second one's
        (512, 256, "torch.rms_norm"),
        (1, 8192, "torch.rms_norm"),
    ],
)
def test_among_boxes_that_are_equally_near_the_product_decides(
    nearest: NearestBuckets, rows: int, hidden_size: int, preferred: str
) -> None:
    preferences = nearest.prior(operation_named("norm.rms"), norm(rows, hidden_size)).preferences
    assert preferences[0][0] == preferred


@pytest.mark.parametrize(("rows", "hidden_size", "is_near"), [(16384, 4096, True), (32768, 4096, False)])
def test_the_reach_is_on_each_axis(nearest: NearestBuckets, rows: int, hidden_size: int, is_near: bool) -> None:
    found = nearest.prior(operation_named("norm.rms"), norm(rows, hidden_size))
    assert bool(found.preferences) == is_near
