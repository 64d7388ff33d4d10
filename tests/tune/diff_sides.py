"""Two sides to compare: results with known times, tables compiled from them, and what a side is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.diff.reading import read_sides
from layerzero_tune.diff.side import Side
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.tune.synthetic_results import ALL_KERNELS, Times, grid, measured, norm

DEFAULT, FUSED, VECTOR = "torch.rms_norm", "torch.rms_norm.fused", "torch.rms_norm.vector_norm"
ROWS = (1, 8, 64)
OTHER_DEVICE = DeviceSpec("cpu", "Another CPU", "avx2", physical_cores=4, threads=4)
BY_ID = {kernel.kernel_id: kernel for kernel in ALL_KERNELS}


def rows_with(
    *fused: float, rows: Sequence[int] = ROWS, vector: float | None = None, **changes: Any
) -> list[Measurement]:
    """Norms of 1024 columns whose default takes 1000 ns, and `fused` these times for one count of rows after the other;
    `vector`, if given, at all of them."""
    times = dict(zip(rows, fused, strict=True))

    def model(context: SelectionContext) -> Times:
        assert context.rows is not None
        found: dict[str, Any] = {DEFAULT: 1000.0, FUSED: times[context.rows]}
        return found if vector is None else {**found, VECTOR: vector}

    return [replace(row, **changes) for row in measured(grid(norm, rows), model)]


def write_results(folder: Path, rows: Iterable[Measurement]) -> Path:
    store = ResultsStore(folder)
    by_contest: dict[str, list[Measurement]] = {}
    for row in rows:
        by_contest.setdefault(row.contest_id, []).append(row)
    for contest in by_contest.values():
        store.append(contest)
    return folder


def write_table(tables: Path, rows: Sequence[Measurement], kernels: Iterable[Kernel] = ALL_KERNELS) -> Path:
    """The folder of the device's table below `tables`."""
    return emit(compile_table(rows, kernels)).write(tables)


def results_side(folder: Path, rows: Sequence[Measurement]) -> Side:
    (side,) = read_sides(write_results(folder, rows), BY_ID)
    return side


def table_side(tables: Path, rows: Sequence[Measurement], kernels: Iterable[Kernel] = ALL_KERNELS) -> Side:
    """A table without the results that it was compiled from."""
    (side,) = read_sides(write_table(tables, rows, kernels), BY_ID)
    return side


SideMaker = Callable[[Path, Sequence[Measurement]], Side]
