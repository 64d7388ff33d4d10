"""Fixtures of the runtime's tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime import dispatch
from layerzero_runtime import snapshot as snapshot_module
from layerzero_runtime.counters import CallCounters
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import publish_snapshot
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_runtime.serving import execution, recovery
from layerzero_runtime.serving.execution import STATE
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.serving.seen_calls import SeenCalls
from layerzero_runtime.snapshot import MAX_ROUTES, Snapshot
from layerzero_runtime.tables import table_files
from layerzero_tune.compile.form import TableForm
from tests.runtime.synthetic_table import write_table

SOURCE = Path(__file__).parent / "fake_nvml.cpp"


def _compile(folder: Path, *options: str) -> Path:
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", "-O0", *options, "-o", str(library), str(SOURCE)], check=True)
    return library


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for NVML with an H100 and an A100; the variable FAKE_NVML makes it fail in several ways."""
    return _compile(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of a driver that does not know all functions."""
    return _compile(tmp_path_factory.mktemp("old_nvml"), "-DOLD")


@pytest.fixture(scope="session")
def synthetic_tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TableForm]:
    """A folder with a table of this machine's CPU, and the form it was printed from."""
    folder = tmp_path_factory.mktemp("tables")
    return folder, write_table(folder, detect_device("cpu"))


@pytest.fixture
def source(synthetic_tables: tuple[Path, TableForm]) -> str:
    """The text of that table."""
    return (synthetic_tables[0] / detect_device("cpu").slug / "__init__.py").read_text(encoding="utf-8")


def write_source(folder: Path, source: str, slug: str = "") -> Path:
    """Write a table's text into the folder of this machine's CPU, or into that of another device."""
    place = folder / (slug or detect_device("cpu").slug)
    place.mkdir(parents=True, exist_ok=True)
    (place / "__init__.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package of installed tables."""
    package = tmp_path / "site" / "tables_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(table_files, "INSTALLED_PACKAGE", package.name)
    monkeypatch.delenv(table_files.TABLES_VARIABLE, raising=False)
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        monkeypatch.delitem(sys.modules, name)
    return package


@contextmanager
def tables_in_force(folder: Path | None) -> Iterator[Snapshot]:
    """A snapshot with the tables of a folder and no installed ones; with no tables at all for None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "INSTALLED_PACKAGE", "no_installed_tables")
        patch.delenv(table_files.TABLES_VARIABLE, raising=False)
        # Counts from zero, and the first miss of each kind still to come.
        patch.setattr(dispatch, "_calls", CallCounters(MAX_ROUTES))
        # Kernels that compile take part without `warmup`, which has tests of its own.
        patch.setattr(STATE, "preparation", "on_first_use")
        if folder is not None:
            patch.setenv(table_files.TABLES_VARIABLE, str(folder))
        yield publish_snapshot()
    publish_snapshot()


@contextmanager
def registry_in_force(registry: Registry) -> Iterator[Snapshot]:
    """A published snapshot with the kernels of this registry alone; breakers and kernels are as before afterwards."""
    try:
        yield dispatch._publish(lambda sources: replace(sources, registry=registry))
    finally:
        dispatch._publish(lambda sources: replace(sources, registry=Registry(builtin_kernels())))
        dispatch.health().reset()


@contextmanager
def capture_in_force() -> Iterator[None]:
    """As under capture of a CUDA graph, which this machine does not have."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (execution, recovery, snapshot_module):
            patch.setattr(module, "is_capturing", lambda: True)
        PUBLISHED.enter_special()
        try:
            yield
        finally:
            PUBLISHED.leave_special()


def forget(seen: SeenCalls) -> None:
    """As if no call had been served."""
    nothing = SeenCalls()
    for name in SeenCalls.__slots__:
        setattr(seen, name, getattr(nothing, name))


@pytest.fixture(scope="module")
def shared_snapshot(synthetic_tables: tuple[Path, TableForm]) -> Iterator[Snapshot]:
    """One snapshot with the synthetic table, for all tests of a module."""
    with tables_in_force(synthetic_tables[0]) as snapshot:
        yield snapshot


@pytest.fixture
def snapshot(synthetic_tables: tuple[Path, TableForm]) -> Iterator[Snapshot]:
    """A fresh snapshot with the synthetic table."""
    with tables_in_force(synthetic_tables[0]) as snapshot:
        yield snapshot


@pytest.fixture(scope="module", params=["with_table", "without_table"])
def served(request: pytest.FixtureRequest, synthetic_tables: tuple[Path, TableForm]) -> Iterator[Snapshot]:
    """The snapshot in force: its tests run with a table and without."""
    with tables_in_force(synthetic_tables[0] if request.param == "with_table" else None) as snapshot:
        yield snapshot
