"""Every scenario has a test: what the script says of this tree, and of small ones that lack something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "scenario_coverage.py"


def coverage(*options: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def tree(folder: Path, marked: str) -> tuple[str, ...]:
    """A folder with two scenarios and the tests given, as options of the script."""
    (folder / "scenarios.json").write_text(json.dumps({"NO-001": "One", "PS-002": "Two"}))
    (folder / "test_some.py").write_text(f"import pytest\n\n\n{marked}")
    return "--tests", str(folder), "--scenarios", str(folder / "scenarios.json")


def test_the_copy_holds_all_scenarios() -> None:
    titles = json.loads((Path(__file__).parent / "scenarios.json").read_text(encoding="utf-8"))
    assert list(titles) == [
        f"{section}-{number:03}" for section in ("NO", "EC", "FS", "CS", "PS") for number in range(1, 36)
    ]
    assert all(titles.values())


def test_every_scenario_has_a_test() -> None:
    run = coverage()
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1] == "175/175"


def test_both_ids_of_a_small_tree_are_found(tmp_path: Path) -> None:
    options = tree(
        tmp_path,
        '@pytest.mark.parametrize("case", [1, 2, 3])\n@pytest.mark.scenario("NO-001", "PS-002")\n'
        "def test_both(case): ...\n",
    )
    run = coverage(*options, folder=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["Normal", "operations", "1", "of", "1", "scenarios,", "1", "tests"]
    assert lines[1].split() == ["Edge", "cases", "0", "of", "0", "scenarios,", "0", "tests"]
    assert lines[-1] == "2/2"
    listed = coverage(*options, "--list", folder=tmp_path).stdout
    assert "PS-002: Two\n    test_some.py::test_both\n" in listed


@pytest.mark.parametrize("extra", ["", "@pytest.mark.skip\n", "@pytest.mark.xfail\n"])
def test_a_missing_id_fails(extra: str, tmp_path: Path) -> None:
    """Nor does a test count that is never run, or may fail."""
    other = f'\n\n@pytest.mark.scenario("PS-002")\n{extra}def test_two(): ...\n' if extra else ""
    run = coverage(*tree(tmp_path, f'@pytest.mark.scenario("NO-001")\ndef test_one(): ...\n{other}'), folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr == "no test carries PS-002: Two\n"
    assert run.stdout.splitlines()[-1] == "1/2"


def test_an_unknown_id_fails(tmp_path: Path) -> None:
    run = coverage(*tree(tmp_path, '@pytest.mark.scenario("NO-001", "PS-002", "PS-2")\ndef test_one(): ...\n'))
    assert run.returncode == 1
    assert "'PS-2' is no scenario, but carried by " in run.stderr
    assert run.stdout.splitlines()[-1] == "2/2"


def test_tests_that_cannot_be_collected_fail(tmp_path: Path) -> None:
    run = coverage(*tree(tmp_path, "import no_such_module\n"), folder=tmp_path)
    assert run.returncode == 1
    assert "no_such_module" in run.stderr
