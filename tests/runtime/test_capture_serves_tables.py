"""Under capture of a graph a table's kernels serve once `warmup` has prepared them, whatever stands behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.serving.execution import STATE
from layerzero_runtime.serving.prepared import PreparedKernels
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from tests.runtime.conftest import capture_in_force, tables_in_force
from tests.runtime.test_dispatch import changes, kernels_in_force
from tests.tune.synthetic_results import contest_rows

DEFAULT = "torch.swiglu"
ROWS, WIDTH = (1, 8, 64), 32


class Counting:
    """A kernel's loader; what it loads counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, context: SelectionContext, configuration: object) -> object:
        def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return silu(gate) * up

        return activate


def _kernel(kernel_id: str) -> tuple[Kernel, Counting]:
    loader = Counting()
    declared = KernelSpec(
        kernel_id=kernel_id,
        operations=("mlp.swiglu",),
        platforms=("cpu",),
        dtypes=("float32",),
        requires_contiguous=True,  # a guard, behind which the default stands
        compiles=True,
    )
    return Kernel(declared, loader), loader  # type: ignore[arg-type]


def _context(rows: int) -> SelectionContext:
    return SelectionContext(
        operation="mlp.swiglu", dtype="float32", mode="graph", rows=rows, hidden_size=WIDTH, device=detect_device("cpu")
    )


@contextmanager
def _table_of(folder: Path, *kernels: Kernel) -> Iterator[Snapshot]:
    """A table of graph mode in which the first of the kernels wins, and the others are as good."""
    times = {kernel.kernel_id: 100.0 + 0.1 * place for place, kernel in enumerate(kernels)}
    known = {kernel.kernel_id: kernel for kernel in (*builtin_kernels(), *kernels)}
    rows = [
        replace(
            row,
            device=detect_device("cpu").to_dict(),
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(known[row.kernel_id]),
        )
        for count in ROWS
        for row in contest_rows(replace(_context(count), device=None), {**times, DEFAULT: 1000.0})
    ]
    emit(compile_table(rows, tuple(known.values()))).write(folder)
    with tables_in_force(folder), kernels_in_force(*kernels) as snapshot:
        STATE.preparation = "warmup"
        yield snapshot


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_prepared", PreparedKernels())


def _called(rows: int, *, strided: bool = False) -> None:
    """A call and a check of its result; strided rows are not contiguous, but their elements are."""
    gate, up = torch.randn(2, rows, 2 * WIDTH)[..., :WIDTH] if strided else torch.randn(2, rows, WIDTH)
    torch.testing.assert_close(lz.swiglu(gate, up), silu(gate) * up)


def test_what_warmup_prepared_is_captured_though_the_default_behind_its_guard_was_never_called(tmp_path: Path) -> None:
    fast, loader = _kernel("test.fast")
    with _table_of(tmp_path, fast):
        [plan] = lz.warmup([_context(8)])
        assert (plan.kernel_id, plan.source) == ("test.fast", "table")
        before, calls = lz.stats(), loader.calls
        with capture_in_force():
            for rows in ROWS:
                _called(rows)
        assert loader.calls == calls + len(ROWS)
        assert changes(before) == {"calls": 3, "hits": 3}


def test_calls_that_the_guard_turns_away_are_captured_with_the_default(tmp_path: Path) -> None:
    fast, loader = _kernel("test.fast")
    with _table_of(tmp_path, fast):
        lz.warmup([_context(8)])
        calls = loader.calls
        with capture_in_force():
            _called(8, strided=True)
            _called(8)
        assert loader.calls == calls + 1


def test_what_was_not_prepared_is_not_captured_but_later_served(tmp_path: Path) -> None:
    fast, loader = _kernel("test.fast")
    with _table_of(tmp_path, fast):
        before = lz.stats()
        with capture_in_force():
            for _ in range(2):
                _called(8)
        assert loader.calls == 0
        assert changes(before) == {"calls": 2, "hits": 2, "unprepared": 2}
        lz.warmup([_context(8)])
        calls = loader.calls
        with capture_in_force():
            _called(8)
        assert loader.calls == calls + 1


@pytest.mark.parametrize("strided", [False, True])
def test_each_plan_of_a_bucket_is_captured_once_it_was_prepared_itself(tmp_path: Path, strided: bool) -> None:
    """One takes contiguous rows, the next one strided rows as well."""
    fast, first = _kernel("test.fast")
    loose, second = _kernel("test.loose")
    loose = replace(loose, spec=replace(loose.spec, requires_contiguous=False, requires_last_dim_stride1=True))
    with _table_of(tmp_path, fast, loose):
        [plan] = lz.warmup([replace(_context(8), is_contiguous=not strided)])
        assert plan.kernel_id == ("test.loose" if strided else "test.fast")
        before, calls = lz.stats(), (first.calls, second.calls)
        with capture_in_force():
            for rows in (8, 20, 64):  # a single row is contiguous
                _called(rows)
                _called(rows, strided=True)
        assert (first.calls, second.calls) == (calls[0] + 3 * (not strided), calls[1] + 3 * strided)
        assert changes(before) == {"calls": 6, "hits": 6, "unprepared": 3}


def test_what_was_loaded_in_graph_mode_but_never_called_is_not_called_first_under_capture(tmp_path: Path) -> None:
    """It need not compile to do in its first call what no capture allows."""
    fast, loader = _kernel("test.fast")
    fast = replace(fast, spec=replace(fast.spec, compiles=False))
    with _table_of(tmp_path, fast):
        with lz.execution_mode("graph"):
            _called(8, strided=True)  # the default's
            with capture_in_force():
                _called(8)
            assert loader.calls == 0
            _called(8)
            assert loader.calls == 1
            with capture_in_force():
                _called(8)
        assert loader.calls == 2


def test_calls_that_wait_for_warmup_are_recorded_whichever_came_first(tmp_path: Path) -> None:
    fast, _ = _kernel("test.fast")
    with _table_of(tmp_path / "tables", fast):
        before = lz.stats()
        lz.record_workload(str(tmp_path / "calls.jsonl"), hits=True)
        with lz.execution_mode("graph"):
            for strided in (True, False, False):
                _called(8, strided=strided)
        lz.record_workload(None)
        assert changes(before) == {"calls": 3, "hits": 3, "unprepared": 2}
    recorded = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("weight", 1) for line in recorded) == 3
