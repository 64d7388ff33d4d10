"""The nearest measured bucket of a call that the table misses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.prior import NearestBuckets
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_runtime.tables.table_files import TABLES_VARIABLE, load_table_file
from layerzero_tune.compile.emit import MODULE_FILE, emit
from layerzero_tune.compile.pipeline import compile_table
from tests.tune.synthetic_kernels import FUSED as SIMPLE
from tests.tune.synthetic_results import DEVICE, compiled, full, grid, measured, norm

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


COMPILED = replace(SIMPLE, spec=replace(SIMPLE.spec, kernel_id="synthetic.compiled", compiles=True))


@pytest.mark.parametrize(("head_dim", "selected"), [(64, COMPILED.spec.kernel_id), (128, "torch.sdpa")])
def test_a_miss_prefers_what_compiles_only_where_the_table_does_so_for_its_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_dim: int, selected: str
) -> None:
    """The table knows 64 as head dimension, up to 8 heads: what these calls have compiled, those of 9 heads run too."""
    kernels = {kernel.kernel_id: kernel for kernel in (*builtin_kernels(), COMPILED)}
    rows = measured(grid(full, (1, 8), (64, 256)), lambda context: {"torch.sdpa": 2e6, COMPILED.kernel_id: 1e6})
    current = [
        replace(
            row,
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(kernels[row.kernel_id]),
        )
        for row in rows
    ]
    emit(compile_table(current, kernels.values())).write(tmp_path)
    monkeypatch.setenv(TABLES_VARIABLE, str(tmp_path))
    snapshot = Snapshot(Registry(kernels.values()), CounterGroup())
    plan = snapshot.select(replace(full(9, 256), head_dim=head_dim, v_head_dim=head_dim).with_device(DEVICE))
    assert (plan.source, plan.kernel_id) == ("live", selected)
