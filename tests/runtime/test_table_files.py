"""Finding tables: which one goes first, and which are skipped, counted and named, never in the way of a call."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import TableError
from layerzero_runtime.tables import table_files
from layerzero_runtime.tables.table import load_table
from layerzero_runtime.tables.table_files import find_table, load_table_file
from layerzero_tune.compile.form import TableForm
from tests.runtime.conftest import tables_in_force, write_source

Tables = tuple[Path, TableForm]
CPU = detect_device("cpu")
MEASURED = SelectionContext(operation="mlp.swiglu", dtype="float32", rows=1, hidden_size=32, device=CPU)


def test_a_table_is_loaded_with_all_that_it_holds(synthetic_tables: Tables) -> None:
    folder, form = synthetic_tables
    table = load_table_file(folder / CPU.slug / "__init__.py")
    assert (table.name, table.device, table.path) == (CPU.slug, CPU, str(folder / CPU.slug / "__init__.py"))
    assert table.provenance["results"] == form.provenance["results"]
    for entry in form.entries:
        found = table.entries[entry.operation][entry.static_key]
        assert len(found.leaves) == len(entry.leaves())
        for chain, leaf in zip(found.leaves, entry.leaves(), strict=True):
            assert [(step.kernel_id, step.guards) for step in chain] == [
                (step.choice[0], step.guards) for step in leaf.chain
            ]


# How a table is spoilt, and what is said of it.
SPOILT: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda source: source.replace("SCHEMA = 1", "SCHEMA = 2"), "table schema is 2, this runtime reads 1"),
    (lambda source: source.replace("SCHEMA = 1\n", "\n"), "table schema is None, this runtime reads 1"),
    (lambda source: source.replace("'platform': 'cpu'", "'platform': 'tpu'"), "device platform is 'tpu'"),
    (lambda source: source[: len(source) // 2], "; compile the results again|is not allowed|was never closed"),
    (lambda source: source + "\nimport os\n", "is not allowed"),
    (
        lambda source: source.replace("'at_most'", "'atmost'").replace("'one_of'", "'oneof'"),
        "kind of a limit is 'oneof'",
    ),
    (lambda source: source.replace("('stride_last_dim',", "('last_stride',"), "'last_stride' is no field of a context"),
    (lambda source: source.replace("'source': ", "'sauce': "), "not a generated table: 'source'"),
    (lambda source: source.replace("PLANS = (", "PLANE = ("), "not a generated table: .*PLANS"),
    (lambda source: "", "table schema is None"),
)


@pytest.mark.scenario("FS-021")
@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[message for _, message in SPOILT])
def test_a_table_that_cannot_be_used_is_skipped_logged_and_counted(
    spoil: Callable[[str], str], message: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    spoilt = spoil(source)
    assert spoilt != source
    folder = write_source(tmp_path, spoilt)
    with pytest.raises(TableError, match=message) as caught:
        load_table_file(folder / CPU.slug / "__init__.py")
    assert str(folder) in str(caught.value)
    before = lz.stats().get("tables_skipped", 0)
    with tables_in_force(folder):
        for _ in range(2):
            plan = lz.select(MEASURED)
            assert (plan.source, plan.table) == ("live", None)
            assert plan.miss_reason == f"no table for device {CPU.slug}"
        assert lz.stats()["tables_skipped"] == before + 1
    [line] = [record.getMessage() for record in caplog.records if record.name == "layerzero"]
    assert line == f"a table was skipped: {caught.value}"


def test_a_table_of_another_device_is_skipped(source: str, tmp_path: Path) -> None:
    other = replace(CPU, name="Another CPU")
    folder = write_source(tmp_path, source.replace(repr(CPU.name), repr(other.name)))
    with tables_in_force(folder) as snapshot:
        assert snapshot.tables.of(CPU) is None
        assert dict(snapshot.counters)["tables_skipped"] >= 1
        _, [error] = find_table(CPU)
    assert f"compiled for {other.slug}, this device is {CPU.slug}" in str(error)


def test_a_table_that_cannot_be_read_is_skipped(tmp_path: Path, source: str) -> None:
    folder = write_source(tmp_path, source)
    (folder / CPU.slug / "__init__.py").write_bytes(b"\xff\xfe\x00")
    with tables_in_force(folder):
        found, [error] = find_table(CPU)
    assert found is None
    assert "cannot be read" in str(error)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with tables_in_force(tmp_path / "nowhere"):
        found, [error] = find_table(CPU)
    assert found is None
    assert "LAYERZERO_TABLES is '" in str(error)
    assert "nowhere', which is not a folder" in str(error)


@pytest.mark.scenario("FS-020")
def test_a_folder_without_this_device_is_no_error(tmp_path: Path, source: str) -> None:
    with tables_in_force(write_source(tmp_path, source, "some_other_device")) as snapshot:
        assert find_table(CPU) == (None, ())
        assert snapshot.select(MEASURED).source == "live"


def test_installed_tables_are_imported_and_a_named_folder_goes_first(
    installed: Path, source: str, synthetic_tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(installed, source)
    found, skipped = find_table(CPU)
    assert found is not None
    assert (found.name, skipped) == (f"{installed.name}.{CPU.slug}", ())
    monkeypatch.setenv(table_files.TABLES_VARIABLE, str(synthetic_tables[0]))
    found, _ = find_table(CPU)
    assert found is not None
    assert found.name == CPU.slug


def test_installed_tables_that_cannot_be_used_are_skipped(
    installed: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_table(CPU) == (None, ())
    for spoilt, message in (
        ("SCHEMA = (", "cannot be imported: SyntaxError"),
        ("import no_such_module_at_all", "cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        (source.replace("SCHEMA = 1", "SCHEMA = 7"), "table schema is 7"),
        (source.replace(repr(CPU.name), "'Another CPU'"), "compiled for cpu_another_cpu"),
    ):
        write_source(installed, spoilt)
        shutil.rmtree(installed / CPU.slug / "__pycache__", ignore_errors=True)
        monkeypatch.delitem(sys.modules, f"{installed.name}.{CPU.slug}", raising=False)
        found, [error] = find_table(CPU)
        assert found is None
        assert message in str(error)


def test_a_broken_folder_leaves_the_installed_table(
    installed: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(installed, source)
    monkeypatch.setenv(table_files.TABLES_VARIABLE, str(write_source(tmp_path / "named", source + "\nimport os\n")))
    found, [error] = find_table(CPU)
    assert found is not None
    assert found.name.startswith(installed.name)
    assert "is not allowed" in str(error)


def test_tables_are_found_per_device(synthetic_tables: Tables) -> None:
    with tables_in_force(synthetic_tables[0]) as snapshot:
        assert snapshot.tables.of(CPU) is not None
        h100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
        for other in (replace(CPU, threads=(CPU.threads or 1) + 1), h100):
            assert snapshot.tables.of(other) is None
            assert snapshot.select(replace(MEASURED, device=other)).source == "live"
        with pytest.raises(TableError, match="table schema is None"):
            load_table(sys.modules[__name__])
