"""Tables of other distributions: found by their entry points, and which of several serves a device."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PathDistribution, entry_points
from pathlib import Path

import pytest

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.dispatch import publish_snapshot
from layerzero_runtime.tables import table_files
from layerzero_runtime.tables.declared_tables import GROUP, declared_tables
from layerzero_runtime.tables.table_candidates import TableCandidate, table_candidates
from layerzero_runtime.tables.table_files import find_alike, find_table
from tests.tune.shipped_tables import OTHER, install, wheel_of, write_norm_table

CPU = detect_device("cpu")
# As like this device as can be, and before it by name.
ALIKE = replace(CPU, name="A CPU")
MISPLACED = replace(CPU, name="Misplaced CPU")
H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
MEASURED = SelectionContext(operation="norm.rms", dtype="float32", rows=8, hidden_size=512, device=CPU)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages in which no other tables are; wheels are installed before the first selection."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(table_files, "INSTALLED_PACKAGE", "no_installed_tables")
    monkeypatch.delenv(table_files.TABLES_VARIABLE, raising=False)
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    publish_snapshot()


def ship(
    site: Path, name: str, day: str = "2026-03-01", device: DeviceSpec = CPU, fastest: str = "torch.rms_norm.fused"
) -> str:
    """Install a wheel with one table; gives the table's module."""
    tables = site.parent / f"tables of {name}"
    write_norm_table(tables, device, day, fastest)
    install(wheel_of(tables, name), site)
    return f"{name.replace('-', '_')}.{device.slug}"


class TestDeclared:
    def test_what_wheels_declare_is_what_importlib_reads(self, site: Path) -> None:
        modules = [ship(site, "acme-b"), ship(site, "acme-a", device=H100)]
        assert declared_tables() == (
            (H100.slug, modules[1], "acme-a 1.0"),
            (CPU.slug, modules[0], "acme-b 1.0"),
        )
        told = {(point.name, point.value) for point in entry_points(group=GROUP)}
        assert {(slug, module) for slug, module, _ in declared_tables()} == told

    def test_files_that_others_write_are_read_as_importlib_reads_them(self, site: Path) -> None:
        info = site / "Odd_Dist-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd.dist\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(
            "[console_scripts]\nrun = odd:main\n\n; a comment = of a kind\n"
            f"[{GROUP}]\n# one = more\n  my_cpu=odd.tables.my_cpu  \n\nmy_gpu = odd.gpu\n[other]\nmy_tpu = odd.tpu\n"
        )
        expected = PathDistribution(info).entry_points.select(group=GROUP)
        assert [(slug, module) for slug, module, _ in declared_tables()] == [(p.name, p.value) for p in expected]
        assert {label for _, _, label in declared_tables()} == {"odd-dist 2.0"}

    def test_leftovers_shadowed_and_damaged_metadata_do_not_count(
        self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = f"[{GROUP}]\nmy_cpu = %s\n"
        later = tmp_path / "later"
        monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), *sys.path, str(later)])
        for folder, name, module in (
            (site, "acme-1.0.dist-info", "first"),
            (later, "ACME-2.0.dist-info", "shadowed"),
            (site, "~cme-0.9.dist-info", "leftover"),
            (later, "developed.egg-info", "developed"),
        ):
            (folder / name).mkdir(parents=True)
            (folder / name / "entry_points.txt").write_text(text % module)
        (site / "bytes-1.0.dist-info").mkdir()
        (site / "bytes-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[layerzero.tables]")
        (site / "file-1.0.dist-info").touch()
        assert declared_tables() == (("my_cpu", "first", "acme 1.0"), ("my_cpu", "developed", "developed"))


class TestOrder:
    def test_of_several_wheels_the_newest_results_serve(self, site: Path) -> None:
        ship(site, "acme-new-of-others", "2026-12-01", device=H100)
        ship(site, "acme-a", "2026-03-01")
        newest = ship(site, "acme-b", "2026-05-01", fastest=OTHER)
        ship(site, "acme-c", "2026-04-01")
        snapshot = publish_snapshot()
        plan = lz.select(MEASURED)
        assert (plan.source, plan.table, plan.kernel_id) == ("table", newest, OTHER)
        assert find_table(CPU)[1] == ()
        assert [table.name.split(".")[0] for table in snapshot.tables.alike(CPU)] == ["acme_b", "acme_c", "acme_a"]

    def test_of_equally_new_ones_the_first_by_name_serves(self, site: Path) -> None:
        ship(site, "acme-b")
        first = ship(site, "acme-a", fastest=OTHER)
        publish_snapshot()
        assert lz.select(MEASURED).table == first

    def test_a_named_folder_goes_first_and_our_own_tables_are_installed_ones(
        self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shipped = ship(site, "acme-a", "2026-05-01")
        own = site / "our_tables"
        write_norm_table(own, CPU, "2026-04-01")
        (own / "__init__.py").touch()
        monkeypatch.setattr(table_files, "INSTALLED_PACKAGE", own.name)
        found, _ = find_table(CPU)
        assert found is not None
        assert found.name == shipped
        assert [table.name for table in find_alike(CPU)] == [shipped, f"our_tables.{CPU.slug}"]
        write_norm_table(tmp_path / "named", CPU, "2026-01-01")
        monkeypatch.setenv(table_files.TABLES_VARIABLE, str(tmp_path / "named"))
        found, _ = find_table(CPU)
        assert found is not None
        assert found.name == CPU.slug
        assert [table.name for table in find_alike(CPU)] == [CPU.slug, shipped, f"our_tables.{CPU.slug}"]

    def test_what_the_first_table_misses_goes_by_the_others_of_the_device(self, site: Path) -> None:
        """The live selector's guess: an older table of this very device before the table of one that is like it."""
        write_norm_table(site.parent / "tables of acme-new", CPU, "2026-05-01")
        module = site.parent / "tables of acme-new" / CPU.slug / "__init__.py"
        module.write_text(module.read_text().replace("'norm.rms': {", "'norm.layer': {"))
        evidence = module.with_name("evidence.json")
        evidence.write_text(evidence.read_text().replace("norm.rms", "norm.layer"))
        install(wheel_of(module.parents[1], "acme-new"), site)
        ship(site, "acme-alike", "2026-06-01", device=ALIKE)
        ship(site, "acme-old", "2026-02-01", fastest=OTHER)
        publish_snapshot()
        plan = lz.select(MEASURED)
        assert (plan.source, plan.table, plan.kernel_id) == ("live", f"acme_new.{CPU.slug}", OTHER)

    def test_tables_that_cannot_be_used_are_skipped_counted_and_named(
        self, site: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "layerzero")
        spoil_shipped(site)
        usable = ship(site, "acme-usable", "2026-01-01")
        before = lz.stats().get("tables_skipped", 0)
        publish_snapshot()
        assert lz.select(MEASURED).table == usable
        assert lz.stats()["tables_skipped"] == before + 4
        lines = [record.getMessage() for record in caplog.records if "a table was skipped" in record.getMessage()]
        assert len(lines) == len(SKIPPED)
        for message in SKIPPED:
            assert [line for line in lines if message in line], message


SKIPPED = (
    "PROVENANCE does not say measured_to; compile the results again",
    "table schema is 7, this runtime reads 1",
    f"was compiled for {MISPLACED.slug}, this device is {CPU.slug}",
    "No module named 'acme_gone'; install acme-gone 1.0 again",
)


def spoil_shipped(site: Path) -> None:
    """Four wheels whose tables cannot serve, each for another reason."""
    for name, old, new in (
        ("acme-bad-order", "'measured_to'", "'measured_two'"),
        ("acme-bad-schema", "SCHEMA = 1", "SCHEMA = 7"),
        ("acme-device", repr(CPU.name), repr(MISPLACED.name)),
    ):
        ship(site, name, "2026-09-01")
        module = site / name.replace("-", "_") / CPU.slug / "__init__.py"
        module.write_text(module.read_text().replace(old, new))
    info = site / "acme_gone-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{CPU.slug} = acme_gone.{CPU.slug}\n")


def told(candidates: tuple[TableCandidate, ...]) -> list[tuple[str, str, str]]:
    """Package, standing and the beginning of the reason."""
    return [(found.name.split(".")[0], found.standing, found.reason.split(";")[0]) for found in candidates]


class TestCandidates:
    def test_every_table_is_listed_in_the_order_in_which_it_is_asked(self, site: Path) -> None:
        ship(site, "acme-a", "2026-03-01")
        ship(site, "acme-b", "2026-05-01")
        ship(site, "acme-c", "2026-05-01")
        ship(site, "acme-alike", "2026-12-01", device=ALIKE)
        ship(site, "acme-h100", "2026-12-01", device=H100)
        candidates = table_candidates(CPU)
        newest = f"acme_b.{CPU.slug}"
        assert told(candidates) == [
            ("acme_b", "serves", "the newest of this device"),
            ("acme_c", "yields", f"as new as {newest}, which goes first by its name"),
            ("acme_a", "yields", f"older results than those of {newest}"),
            ("acme_alike", "approximate", "of A CPU, which is like this device"),
            ("acme_h100", "other device", "of NVIDIA H100 80GB HBM3"),
        ]
        assert [found.origin for found in candidates[:2]] == ["acme-b 1.0", "acme-c 1.0"]
        [serving, found] = candidates[0].table, find_table(CPU)[0]
        assert serving is not None
        assert found is not None
        assert serving.path == found.path

    def test_a_named_folder_goes_first(self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ship(site, "acme-a", "2026-03-01")
        write_norm_table(tmp_path / "named", CPU, "2026-01-01")
        monkeypatch.setenv(table_files.TABLES_VARIABLE, str(tmp_path / "named"))
        first, second = table_candidates(CPU)
        assert (first.name, first.origin) == (str(tmp_path / "named" / CPU.slug / "__init__.py"), "LAYERZERO_TABLES")
        assert (first.standing, first.reason) == ("serves", "LAYERZERO_TABLES goes first")
        assert (second.standing, second.reason.split(";")[0]) == ("yields", "LAYERZERO_TABLES goes first")

    def test_tables_that_cannot_be_used_say_why(
        self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_shipped(site)
        monkeypatch.setenv(table_files.TABLES_VARIABLE, str(tmp_path / "nowhere"))
        candidates = table_candidates(CPU)
        assert {found.standing for found in candidates} == {"refused"}
        assert find_alike(CPU) == ()
        assert all(found.table is None or found.name.startswith("acme_device") for found in candidates)
        reasons = " | ".join(found.reason for found in candidates)
        for message in (
            *SKIPPED[:2],
            SKIPPED[3],
            "which is not a folder",
            f"was compiled for {MISPLACED.slug}, but lies",
        ):
            assert message in reasons

    def test_without_any_table_there_is_no_candidate(self, site: Path) -> None:
        assert table_candidates(CPU) == ()
