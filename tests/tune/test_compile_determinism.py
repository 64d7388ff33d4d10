"""Equal results compile to equal bytes: whatever the order of rows and files, the process, or its hash seed."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_tune.compile.emit import EmittedTable, emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import tune
from tests.tune.recordings import recorded_contests, recorded_rows
from tests.tune.synthetic_results import ALL_KERNELS


@cache
def table() -> EmittedTable:
    return emit(compile_table(recorded_rows(), ALL_KERNELS))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of many files: contests apart, and two compacted parts."""
    folder = tmp_path_factory.mktemp("results")
    contests = recorded_contests()
    store = ResultsStore(folder)
    for number, rows in enumerate(contests):
        store.append(rows)
        if number == len(contests) // 2:
            store.compact()
    return folder


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_rows_and_kernels_is_of_no_account(seed: int) -> None:
    order = random.Random(seed)
    rows, kernels = list(recorded_rows()), list(ALL_KERNELS)
    order.shuffle(rows)
    order.shuffle(kernels)
    assert emit(compile_table(rows, kernels)) == table()


def test_files_in_another_order_compile_to_the_same_bytes(results: Path, tmp_path: Path) -> None:
    """A copy that was written the other way round, under other times, and one that was compacted."""
    assert len(list(results.glob("*.parquet"))) > 50
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(results.glob("*.parquet"), reverse=True):
        shutil.copyfile(path, copy / path.name)
    compacted = tmp_path / "compacted"
    shutil.copytree(results, compacted)
    ResultsStore(compacted).compact()
    assert len(list(compacted.glob("*.parquet"))) == 1
    for folder in (results, copy, compacted):
        assert emit(compile_table(ResultsStore(folder).read().rows, ALL_KERNELS)) == table()


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_processes_with_other_hash_seeds_write_the_same_bytes(results: Path, tmp_path: Path, seed: str) -> None:
    done = tune("compile", results, "--out", tmp_path, PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / table().slug / "__init__.py").read_bytes() == table().module.encode()
    assert (tmp_path / table().slug / "evidence.json").read_bytes() == table().evidence.encode()


@pytest.mark.parametrize("towards", [-math.inf, math.inf])
def test_a_machine_whose_logarithms_end_in_another_bit_compiles_the_same(
    towards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C libraries differ in the last bit of transcendental functions."""

    def off_by_a_bit(exact: Callable[[float], float]) -> Callable[[float], float]:
        return lambda value: math.nextafter(exact(value), towards)

    for name in ("log", "log2", "exp", "log1p", "expm1"):
        monkeypatch.setattr(math, name, off_by_a_bit(getattr(math, name)))
    assert emit(compile_table(recorded_rows(), ALL_KERNELS)) == table()


def test_another_time_gives_another_table() -> None:
    rows = list(recorded_rows())
    timed = next(index for index, row in enumerate(rows) if row.samples_ns)
    rows[timed] = replace(rows[timed], samples_ns=tuple(2.0 * time for time in rows[timed].samples_ns))
    assert emit(compile_table(rows, ALL_KERNELS)).module != table().module
