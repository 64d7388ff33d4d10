"""The nearest measured bucket of a call that the table misses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import DeviceSpec
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


GPU = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), index=0)
ANYWHERE = replace(SIMPLE.spec, operations=("norm.rms",), platforms=("cpu", "cuda"), dtypes=("float16", "bfloat16"))
FAST = replace(SIMPLE, spec=replace(ANYWHERE, kernel_id="synthetic.fast"))


def table_of_types(folder: Path, device: DeviceSpec, rows_of: Mapping[str, Sequence[int]]) -> NearestBuckets:
    """By type the measured rows. From 64 rows on another kernel than the default wins."""

    def times(context: SelectionContext) -> dict[str, float]:
        return {"torch.rms_norm": 1e6, FAST.kernel_id: 5e5 if (context.rows or 0) >= 64 else 2e6}

    contexts = [replace(norm(rows), dtype=dtype, weight_dtype=dtype) for dtype in rows_of for rows in rows_of[dtype]]
    found = [replace(row, device=device.to_dict()) for row in measured(contexts, times)]
    written = emit(compile_table(found, (*builtin_kernels(), FAST))).write(folder)
    return NearestBuckets(load_table_file(written / MODULE_FILE))


def preferred(buckets: NearestBuckets, rows: int, dtype: str) -> str | None:
    context = replace(norm(rows), dtype=dtype, weight_dtype=dtype)
    preferences = buckets.prior(operation_named("norm.rms"), context).preferences
    return preferences[0][0] if preferences else None


def test_on_a_gpu_one_16_bit_type_stands_in_for_the_other(tmp_path: Path) -> None:
    buckets = table_of_types(tmp_path, GPU, {"float16": (1, 4, 16, 64, 256, 1024)})
    assert [preferred(buckets, rows, "bfloat16") for rows in (2, 256)] == ["torch.rms_norm", FAST.kernel_id]
    assert preferred(buckets, 256, "float32") is None
    on_cpu = table_of_types(tmp_path / "cpu", DEVICE, {"float16": (1, 4, 16, 64, 256, 1024)})
    assert preferred(on_cpu, 256, "bfloat16") is None


def test_the_other_types_bucket_goes_before_a_distant_one_of_the_own_type(tmp_path: Path) -> None:
    buckets = table_of_types(tmp_path, GPU, {"float16": (1, 4, 16, 64, 256, 1024), "bfloat16": (1, 4, 16)})
    assert preferred(buckets, 256, "bfloat16") == FAST.kernel_id
    assert preferred(buckets, 2, "bfloat16") == "torch.rms_norm"


COMPILED = replace(SIMPLE, spec=replace(SIMPLE.spec, kernel_id="synthetic.compiled", compiles=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_miss_prefers_what_the_nearest_bucket_does_of_near_features_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    """The table knows 64 as head dimension, up to 8 heads. That the kernel compiles is no matter: it does so in
    `warmup`, or where preparation("on_first_use") allows it."""
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
    assert (plan.source, plan.kernel_id) == ("live", COMPILED.kernel_id)
