"""`layerzero-tune doctor` on tables: which one serves, and why each other does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.tables import table_files
from layerzero_runtime.tables.table_files import TABLES_VARIABLE
from layerzero_tune.command_line.inspect import _unavailable_reason
from tests.tune.command import CommandsHere
from tests.tune.shipped_tables import write_norm_table

CPU = detect_device("cpu")
H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0))


@pytest.fixture
def named(command: CommandsHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of LAYERZERO_TABLES, the only place that has tables."""
    monkeypatch.setattr(table_files, "INSTALLED_PACKAGE", "no_installed_tables")
    monkeypatch.setenv(TABLES_VARIABLE, str(tmp_path))
    return tmp_path


def test_every_table_is_shown_with_what_comes_of_it(command: CommandsHere, named: Path) -> None:
    for device in (CPU, H100):
        write_norm_table(named, device)
    damaged = named / "some_device"
    damaged.mkdir()
    (damaged / "__init__.py").write_text("SCHEMA = 0\n")
    report = command("doctor", "--device", "cpu", "--json").json
    path = str(named / CPU.slug / "__init__.py")
    assert report["table"]["path"] == path
    assert report["tables"][0] == {
        "name": path,
        "origin": "LAYERZERO_TABLES",
        "slug": CPU.slug,
        "standing": "serves",
        "reason": "LAYERZERO_TABLES goes first",
        "measured_to": "2026-03-01T10:00:00+00:00",
        "operations": ["norm.rms"],
    }
    assert [(table["slug"], table["standing"]) for table in report["tables"][1:]] == [
        (H100.slug, "other device"),
        ("some_device", "refused"),
    ]
    assert report["tables"][2]["measured_to"] is None
    shown = command("doctor", "--device", "cpu").output.splitlines()
    begin = shown.index("Tables that are there, in the order in which they are asked")
    assert [line.split()[0] for line in shown[begin + 1 : begin + 8 : 3]] == ["serves", "other", "refused"]
    assert "measured 2026-03-01T10:00:00+00:00: norm.rms" in shown[begin + 3]
    assert "of NVIDIA H100 80GB HBM3" in shown[begin + 5]
    assert "table schema is 0" in shown[begin + 8]


def test_without_a_table_none_is_listed(command: CommandsHere, named: Path) -> None:
    assert command("doctor", "--device", "cpu", "--json").json["tables"] == []
    shown = command("doctor", "--device", "cpu").output
    assert "none for this device" in shown
    assert "Tables that are there" not in shown


def test_kernels_of_other_compute_capabilities_and_of_old_or_missing_libraries_say_so() -> None:
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    attention = kernels["flash_attn_4.forward"]
    ampere = replace(H100, compute_capability=(8, 0))
    assert _unavailable_reason(attention, CPU) == "runs on cuda, the device is cpu"
    assert _unavailable_reason(attention, ampere) == "runs on compute capabilities >= (9, 0), the device has (8, 0)"
    assert "layerzero-dispatch[flash-attn-4]" in str(_unavailable_reason(attention, H100))
    flash = kernels["torch.sdpa.flash"]
    assert _unavailable_reason(flash, H100) is None
    newer = replace(flash, spec=replace(flash.spec, min_version="99"))
    assert "required at least 99" in str(_unavailable_reason(newer, H100))
