"""Wheels, ours and those of tables, in a virtual environment in which nothing else is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.tables.table_files import load_table_file
from tests.tune.command import tune
from tests.tune.shipped_tables import NAMED, OTHER, write_norm_table

ROOT = Path(__file__).parent.parent

DEVICE = DeviceSpec("cpu", "Synthetic CPU", "avx2", physical_cores=2, threads=2)

_SELECT = """
import json, sys
import layerzero_runtime as lz
device = lz.DeviceSpec.from_dict(json.loads(sys.argv[1]))
plan = lz.select(lz.SelectionContext(operation="norm.rms", dtype="%s", rows=64, hidden_size=512, device=device))
outside = sorted({name.split(".")[0] for name in sys.modules} - {*sys.stdlib_module_names, "sitecustomize"})
from layerzero_runtime.tables.table_candidates import table_candidates
standings = [[found.origin, found.standing, found.reason] for found in table_candidates(device)]
answer = [plan.source, plan.table, plan.kernel_id, plan.available, plan.unavailable_reason]
print(json.dumps([answer, outside, standings]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_all_packages_and_no_measurements(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    models = ROOT.glob("layerzero_tune/workload/*.toml")
    for path in (*ROOT.glob("layerzero_*/**/*.py"), *models, ROOT / "layerzero_runtime" / "py.typed"):
        assert str(path.relative_to(ROOT)) in names
    assert "layerzero_tune/templates/table.py.j2" in names
    for path in (ROOT / "tables").glob("*/__init__.py"):
        assert {f"layerzero_tables/{path.parent.name}/{name}" for name in ("__init__.py", "evidence.json")} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".parquet")]
    assert b"Requires-Dist: torch" in zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA")))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment without torch: our wheel, and two wheels of tables for one device."""
    folder = tmp_path_factory.mktemp("bare")
    for name, day, fastest in (("acme-tables", "2026-03-01", NAMED), ("zeta-tables", "2026-05-01", OTHER)):
        tables = write_norm_table(folder / name, DEVICE, day, fastest)
        done = tune("wheel", tables, "--name", name, "--out", folder / "dist")
        assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    # All in one call, dependencies included: the tables' wheels ask for ours.
    installed = subprocess.run([*pip, wheel, *(folder / "dist").iterdir()], capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    return python


def select(python: Path, device: Mapping[str, Any], dtype: str) -> Any:
    """The plan of a norm, the modules from outside the standard library that it took, and the tables that are there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAYERZERO"))}
    command = [str(python), "-c", _SELECT % dtype, json.dumps(device)]
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=python.parents[2], timeout=60
    )
    return json.loads(run.stdout)


def test_an_installed_wheel_answers_without_torch(bare: Path) -> None:
    """The shipped table answers, says what is missing, and imports itself alone."""
    folder = min(path.parent for path in (ROOT / "tables").glob("*/__init__.py"))
    device = load_table_file(folder / "__init__.py").device
    (source, table, _, available, reason), outside, _ = select(bare, device.to_dict(), "bfloat16")
    assert (source, table, available) == ("table", f"layerzero_tables.{folder.name}", False)
    assert "torch" in reason
    assert outside == ["__main__", "layerzero_runtime", "layerzero_tables"]


def test_of_two_wheels_of_tables_the_newer_serves_without_torch(bare: Path) -> None:
    (source, table, kernel_id, available, _), outside, standings = select(bare, DEVICE.to_dict(), "float32")
    newest = f"zeta_tables.{DEVICE.slug}"
    assert (source, table, kernel_id, available) == ("table", newest, OTHER, False)
    assert outside == ["__main__", "acme_tables", "layerzero_runtime", "layerzero_tables", "zeta_tables"]
    assert [(origin, standing) for origin, standing, _ in standings[:2]] == [
        ("zeta-tables 2026.5.1", "serves"),
        ("acme-tables 2026.3.1", "yields"),
    ]
    assert {(origin, standing) for origin, standing, _ in standings[2:]} == {("layerzero-dispatch", "other device")}
    assert standings[1][2].startswith(f"older results than those of {newest}")
