"""The wheel holds what it needs: runtime, tuner, templates and tables, installed without any dependency."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_SELECT = """
import json, sys
import layerzero_runtime as lz
from layerzero_tables.{slug} import DEVICE
device = lz.DeviceSpec.from_dict(DEVICE)
plan = lz.select(lz.SelectionContext(operation="norm.rms", dtype="bfloat16", rows=64, hidden_size=2048, device=device))
outside = sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
print(json.dumps([plan.source, plan.available, plan.unavailable_reason, outside]))
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
    for path in (*ROOT.glob("layerzero_*/**/*.py"), ROOT / "layerzero_runtime" / "py.typed"):
        assert str(path.relative_to(ROOT)) in names
    assert "layerzero_tune/templates/table.py.j2" in names
    for path in (ROOT / "tables").glob("*/__init__.py"):
        assert {f"layerzero_tables/{path.parent.name}/{name}" for name in ("__init__.py", "evidence.json")} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".parquet")]
    assert b"Requires-Dist: torch" in zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA")))


def test_an_installed_wheel_answers_without_torch(wheel: Path, tmp_path: Path) -> None:
    """In a bare virtual environment: the shipped table answers, says what is missing, and imports itself alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=60)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAYERZERO"))}
    slug = min(path.parent.name for path in (ROOT / "tables").glob("*/__init__.py"))
    command = [str(tmp_path / "bin" / "python"), "-c", _SELECT.replace("{slug}", slug)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    source, available, reason, outside = json.loads(run.stdout)
    assert source == "table"
    assert available is False
    assert "torch" in reason
    assert outside == ["__main__", "layerzero_runtime", "layerzero_tables"]
