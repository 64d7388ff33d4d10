"""Staleness: what makes an entry stale, and what does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import TableError
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables import staleness
from layerzero_runtime.tables.staleness import kernel_source_hash, stale_entries, stale_message, stale_reasons
from layerzero_runtime.tables.table import Table, load_table
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.results.measurement import Measurement
from tests.runtime.conftest import registry_in_force, tables_in_force
from tests.tune.synthetic_results import contest_rows

ADAPTER = '''"""An adapter."""

from layerzero_runtime.kernel import Kernel, KernelSpec

_BLOCK = 64


def load(context, configuration):
    return lambda gate, up: gate * up * _BLOCK


_SPEC = KernelSpec(kernel_id="mine.swiglu", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",))
KERNELS = (Kernel(_SPEC, load),)
'''


def adapter_hash(tmp_path: Path, name: str, source: str) -> str:
    path = tmp_path / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return kernel_source_hash(module.KERNELS[0])


def test_code_and_constants_count_declarations_and_comments_do_not(tmp_path: Path) -> None:
    measured = adapter_hash(tmp_path, "adapter_before", ADAPTER)
    assert len(measured) == 32
    harmless = {
        "limit": ADAPTER.replace('dtypes=("float32",)', 'dtypes=("float32", "bfloat16"), min_seq_len=4'),
        "docstring": ADAPTER.replace("An adapter.", "The same adapter."),
        "comment": ADAPTER.replace("_SPEC =", "# A comment.\n_SPEC ="),
        "import": ADAPTER.replace("from layerzero", "import math\n\nfrom layerzero"),
        "space": ADAPTER.replace("import Kernel,", "import ConfigurationSpace, Kernel,").replace(
            "KERNELS = (Kernel(_SPEC, load),)",
            '_SPACE = ConfigurationSpace({"block": (64, 128)})\nKERNELS = (Kernel(_SPEC, load, _SPACE),)',
        ),
    }
    for name, source in harmless.items():
        assert source != ADAPTER
        assert adapter_hash(tmp_path, f"adapter_{name}", source) == measured, name
    for name, source in {
        "constant": ADAPTER.replace("_BLOCK = 64", "_BLOCK = 128"),
        "function": ADAPTER.replace("gate * up * _BLOCK", "up * gate * _BLOCK"),
    }.items():
        assert adapter_hash(tmp_path, f"adapter_{name}", source) != measured, name


def test_further_files_of_a_kernel_count_as_its_adapter_does(tmp_path: Path) -> None:
    source = ADAPTER.replace("Kernel(_SPEC, load)", 'Kernel(_SPEC, load, sources=("sources/tiles.py",))')
    tiles = tmp_path / "sources" / "tiles.py"
    tiles.parent.mkdir()
    tiles.write_text("import math\n\nSIZE = 16\n")
    alone, measured = adapter_hash(tmp_path, "adapter_alone", ADAPTER), adapter_hash(tmp_path, "adapter_joined", source)
    assert len(measured) == 32
    assert measured != alone
    for text, is_other in (("import re\n\nSIZE = 16\n", False), ("import math\n\nSIZE = 32\n", True)):
        tiles.write_text(text)
        staleness._code_hash.cache_clear()
        staleness._joined_hash.cache_clear()
        assert (adapter_hash(tmp_path, "adapter_joined", source) != measured) == is_other


def test_the_files_that_builtin_kernels_name_are_there() -> None:
    for kernel in builtin_kernels():
        folder = Path(kernel.load.__code__.co_filename).parent
        assert [name for name in kernel.sources if not (folder / name).is_file()] == []


LIBRARY, DIGITS = "acme-kernels", 2
ACME_NORM, ACME_SWIGLU = "acme.rms_norm", "acme.swiglu"
# Which kernel wins at which number of rows, in the table's two operations.
WINNERS = {
    "norm.rms": {1: ACME_NORM, 16: "torch.rms_norm.fused", 256: ACME_NORM, 4096: "torch.rms_norm"},
    "mlp.swiglu": {1: "torch.swiglu.in_place", 16: ACME_SWIGLU, 256: "torch.swiglu", 4096: "torch.swiglu"},
}
STALE = {(operation, rows) for operation, won in WINNERS.items() for rows in won if won[rows].startswith("acme.")}


def _acme(kernel_id: str, operation: str, function: KernelFunction) -> Kernel:
    return Kernel(
        KernelSpec(
            kernel_id=kernel_id,
            operations=(operation,),
            platforms=("cpu",),
            dtypes=("float32",),
            library=LIBRARY,
            version_digits=DIGITS,
        ),
        FunctionLoader(function),
    )


KERNELS = (
    *builtin_kernels(),
    _acme(ACME_NORM, "norm.rms", lambda x, weight, eps, offset: torch.rms_norm(x, x.shape[-1:], weight, eps)),
    _acme(ACME_SWIGLU, "mlp.swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up),
)


def at(operation: str, rows: int) -> SelectionContext:
    return SelectionContext(operation=operation, dtype="float32", rows=rows, hidden_size=32)


def measurements() -> list[Measurement]:
    """Contests of each operation's kernels that were measured with version 1.2.0 of the library."""
    by_id = {kernel.kernel_id: kernel for kernel in KERNELS}
    rows = []
    for operation, winners in WINNERS.items():
        for count, winner in winners.items():
            times = {kernel_id: 1000.0 if kernel_id == winner else 2000.0 for kernel_id in {*winners.values()}}
            rows += contest_rows(at(operation, count), dict(sorted(times.items())))
    return [
        replace(
            row,
            device=detect_device("cpu").to_dict(),
            versions={"torch": library_version("torch") or "", LIBRARY: "1.2.0"},
            source_hash=kernel_source_hash(by_id[row.kernel_id]),
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    emit(compile_table(measurements(), KERNELS)).write(folder)
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts the metadata of a version of the library where installed distributions are looked for."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(version: str) -> None:
        for folder in tmp_path.glob("acme_kernels-*.dist-info"):
            folder.rmdir()
        (tmp_path / f"acme_kernels-{version}.dist-info").mkdir()
        library_version.cache_clear()

    yield installed
    library_version.cache_clear()


def served(snapshot: Snapshot) -> dict[tuple[str, int], tuple[str, str]]:
    """(source, kernel) of the selection at every measured size."""
    plans = {
        (operation, rows): snapshot.select(at(operation, rows).with_device(detect_device("cpu")))
        for operation, winners in WINNERS.items()
        for rows in winners
    }
    return {place: (plan.source, plan.kernel_id) for place, plan in plans.items()}


AS_MEASURED = {(operation, rows): ("table", won[rows]) for operation, won in WINNERS.items() for rows in won}


@pytest.mark.parametrize("version", ["1.2.0", "1.2.9", "1.2.0+cu130"])
def test_a_version_that_differs_in_no_digit_that_matters_leaves_every_entry_as_it_was(
    version: str, tables: Path, install: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    install(version)
    with tables_in_force(tables), registry_in_force(Registry(KERNELS)) as snapshot:
        assert served(snapshot) == AS_MEASURED
    assert not [record for record in caplog.records if "stale" in record.getMessage()]


@pytest.mark.parametrize("version", ["1.3.0", "2.2.0", "1.20"])
def test_another_version_of_one_library_makes_exactly_its_entries_stale(
    version: str, tables: Path, install: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    install(version)
    with tables_in_force(tables), registry_in_force(Registry(KERNELS)) as snapshot:
        for _ in range(2):
            found = served(snapshot)
        before = lz.stats()
        for rows in (1, 16, 256, 4096):
            x, weight = torch.randn(rows, 32), torch.ones(32)
            torch.testing.assert_close(lz.rms_norm(x, weight), torch.rms_norm(x, (32,), weight, 1e-6))
            torch.testing.assert_close(lz.swiglu(x, x), torch.nn.functional.silu(x) * x)
        after = lz.stats()
        table = snapshot.tables.of(detect_device("cpu"))
    assert {place for place in found if found[place] != AS_MEASURED[place]} == STALE
    assert {found[place][0] for place in STALE} == {"live"}
    assert not {found[place][1] for place in STALE} & {ACME_NORM, ACME_SWIGLU}
    # The calls: those of stale entries miss, all others hit.
    assert [after[name] - before[name] for name in ("hits", "misses")] == [8 - len(STALE), len(STALE)]
    assert table is not None
    entries = stale_entries(table, stale_reasons(table, Registry(KERNELS)))
    assert sorted(entry.kernel_id for entry in entries) == [ACME_NORM, ACME_NORM, ACME_SWIGLU]
    installed = ".".join(version.split(".")[:DIGITS])
    stale = [record.getMessage() for record in caplog.records if "stale" in record.getMessage()]
    buckets = sum(len(entry.leaves) for by_key in table.entries.values() for entry in by_key.values())
    assert stale == [
        f"3 of {buckets} entries of {table.name} are stale, the next plan or the live selector serves in their place: "
        f"measured with {LIBRARY} 1.2, installed is {installed} ({ACME_NORM}, {ACME_SWIGLU}). To renew them, with the "
        "table's results in RESULTS: layerzero-tune run --device cpu --out RESULTS && layerzero-tune compile RESULTS "
        "--out TABLES"
    ]


def test_a_library_that_is_gone_makes_nothing_stale(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    library_version.cache_clear()
    with tables_in_force(tables), registry_in_force(Registry(KERNELS)) as snapshot:
        assert served(snapshot) == AS_MEASURED
    assert not caplog.records


def small_table(*leaves: object, kernels: Sequence[str] = (ACME_SWIGLU, "torch.swiglu")) -> Table:
    """A generated table with one static key; plan 0 is ours, plan 1 torch's."""
    module = ModuleType("small")
    values = {
        "SCHEMA": 1,
        "DEVICE": detect_device("cpu").to_dict(),
        "PROVENANCE": {},
        "KERNELS": {kernel_id: {"library": LIBRARY, "version": "1.2", "source": ""} for kernel_id in kernels},
        "PLANS": tuple((kernel_id, {}) for kernel_id in kernels),
        "ENTRIES": {"mlp.swiglu": {("eager", "float32", ()): (lambda rows, hidden_size: 0, leaves)}},
    }
    vars(module).update(values)
    return load_table(module)


def test_entries_are_stale_by_their_plan_not_by_what_stands_behind_it() -> None:
    table = small_table(((1, ()), (0, ())), ((0, ()), (1, ())), (), ((1, ()),))
    reasons = {ACME_SWIGLU: "for a test"}
    (stale,) = stale_entries(table, reasons)
    assert (stale.operation, stale.leaf, stale.reason) == ("mlp.swiglu", 1, "for a test")
    # A bucket of sizes that were not measured is no entry.
    assert stale_message(table, reasons).startswith("1 of 3 entries of small are stale")


def test_a_damaged_entry_is_left_out_of_the_count() -> None:
    class Damaged:
        @property
        def leaves(self) -> object:
            raise TableError("not a generated table")

    table = small_table(((0, ()),))
    entries: Any = {**table.entries["mlp.swiglu"], ("eager", "bfloat16", ()): Damaged()}
    parts = {name: getattr(table, name) for name in ("name", "path", "device", "provenance", "kernels")}
    damaged = Table(**parts, entries={"mlp.swiglu": entries})
    assert stale_message(damaged, {ACME_SWIGLU: "for a test"}).startswith("1 of 1 entries of small are stale")


def test_the_message_names_a_few_kernels_of_each_reason_and_the_operations_that_are_concerned(tables: Path) -> None:
    table = load_table_file(tables / detect_device("cpu").slug / "__init__.py")
    reasons = dict.fromkeys(("a.a", ACME_NORM, "b.b", "c.c"), "for a test") | {"d.d": "for another"}
    message = stale_message(table, reasons)
    assert message.startswith("2 of ")
    assert f": for a test (a.a, {ACME_NORM}, b.b and 1 more); for another (d.d). To renew" in message
    assert "layerzero-tune run --device cpu --ops norm.rms --out RESULTS" in message
