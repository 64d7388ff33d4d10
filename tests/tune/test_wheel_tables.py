"""Tables before they are packed: found in their folders, and refused where they are not what `compile` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import TableError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.wheel.table_folder import read_tables
from tests.tune.command import CommandsHere
from tests.tune.shipped_tables import OTHER_DEVICE, evaluation_of, write_norm_table
from tests.tune.synthetic_results import DEVICE, Times, grid, measured, norm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of one device's table."""
    return write_norm_table(tmp_path / "single", DEVICE)


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return spoil


def evaluated_elsewhere(folder: Path) -> None:
    (folder / "evaluation.json").write_text(evaluation_of(folder).replace("2026-03-01", "2026-03-05"))


def evaluated_badly(folder: Path) -> None:
    (folder / "evaluation.json").write_text('{"summaries": []}')


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("my_cpu"))


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a statement too many": (
        replaced("__init__.py", "\nDEVICE", "\nimport os\nDEVICE"),
        r"__init__.py:\d+: the statement Import is not allowed",
    ),
    "another schema": (replaced("__init__.py", "SCHEMA = 1", "SCHEMA = 0"), "table schema is 0, this runtime reads 1"),
    "provenance without its results": (
        replaced("__init__.py", "'results': ", "'result': "),
        "PROVENANCE lacks results; compile the results again",
    ),
    "another device's folder": (
        moved,
        "my_cpu holds a table of cpu_synthetic_cpu_avx2_2c_2t; rename",
    ),
    "an edge that was moved": (
        replaced("__init__.py", "512 <= hidden_size", "513 <= hidden_size"),
        "evidence.json is not of the module beside it: norm.rms .* at .* is in another bucket",
    ),
    "no evidence": (lambda folder: (folder / "evidence.json").unlink(), "evidence.json: cannot be read"),
    "damaged evidence": (replaced("evidence.json", "{", "{{"), "evidence.json is damaged"),
    "evidence of another operation": (
        replaced("evidence.json", "norm.rms", "norm.layer"),
        "is not of the module beside it: it has other static keys",
    ),
    "a bucket too many": (
        replaced("evidence.json", "[\n", '[\n{"bucket": {}, "evidence": null},\n'),
        "has 2 buckets, the module 1",
    ),
    "an evaluation of other results": (evaluated_elsewhere, "evaluation.json is an evaluation of other results"),
    "an evaluation that is none": (
        evaluated_badly,
        r"evaluation.json is not what evaluate --json prints \(KeyError\('provenance'\)\)",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_table_that_is_not_what_compile_wrote_is_refused(
    spoilt: str, folder: Path, command: CommandsHere, tmp_path: Path
) -> None:
    spoil, message = SPOILT[spoilt]
    spoil(folder)
    with pytest.raises(TableError, match=message):
        read_tables([tmp_path / "single"])
    ended = command("wheel", tmp_path / "single", "--name", "acme", "--out", tmp_path / "dist", "--json")
    assert (ended.status, ended.output) == (1, "")
    assert not (tmp_path / "dist").exists()


class TestReadTables:
    def test_a_folder_of_tables_a_device_folder_and_several(self, two_tables: Path, folder: Path) -> None:
        assert [table.slug for table in read_tables([two_tables])] == [OTHER_DEVICE.slug, DEVICE.slug]
        assert [table.slug for table in read_tables([folder, two_tables / OTHER_DEVICE.slug])] == [
            OTHER_DEVICE.slug,
            DEVICE.slug,
        ]
        assert [table.slug for table in read_tables([folder, folder.parent])] == [DEVICE.slug]

    def test_a_bucket_that_a_miss_parts_has_its_points_in_several_leaves(self, tmp_path: Path) -> None:
        def fastest(context: SelectionContext) -> Times:
            return {"torch.rms_norm": 2000.0, "torch.rms_norm.fused": 1000.0}

        rows = measured(grid(norm, (1, 4, 256, 4096), (64, 256)), fastest)
        form = compile_table(rows, builtin_kernels())
        parted = [leaf for leaf in form.entries[0].leaves() if leaf.chain]
        assert len(parted) == 2
        assert parted[0].evidence == parted[1].evidence
        emit(form).write(tmp_path)
        assert [table.slug for table in read_tables([tmp_path])] == [DEVICE.slug]

    def test_two_tables_of_one_device_are_refused(self, two_tables: Path, folder: Path) -> None:
        with pytest.raises(TableError, match=f"are both tables of {DEVICE.slug}; ship one of them"):
            read_tables([two_tables, folder])

    def test_a_folder_without_a_table_is_named(self, tmp_path: Path) -> None:
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(TableError, match=f"{place} holds no table; compile results with"):
                read_tables([place])

    def test_the_shipped_tables_can_be_packed(self) -> None:
        assert all(table.evaluation for table in read_tables([ROOT / "tables"]))
