"""Which tests carry each scenario's marker; fails if a scenario has none, or a marker names an unknown one.

usage: python scripts/scenario_coverage.py [--tests FOLDER] [--scenarios FILE] [--list]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "NO": "Normal operations",
    "EC": "Edge cases",
    "FS": "Failures",
    "CS": "Concurrency",
    "PS": "Performance",
}


class _Collector:
    """Notes the tests by the scenarios that they carry; one that never runs, or may fail, shows nothing."""

    def __init__(self) -> None:
        self.tests: dict[str, set[str]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "scenario(id): the test carries a scenario of the behaviour asked for")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if any(item.get_closest_marker(name) for name in ("skip", "xfail")):
                continue
            # The cases of a parametrised test are one test.
            test = item.nodeid.split("[")[0]
            for marker in item.iter_markers("scenario"):
                for scenario in marker.args:
                    self.tests.setdefault(scenario, set()).add(test)


def tests_by_scenario(folder: Path) -> dict[str, set[str]]:
    """The names of the tests in a folder by the scenarios that they carry.

    Raises:
        RuntimeError: the tests cannot be collected.
    """
    collector, printed = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(folder)], plugins=[collector])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the tests in {folder} cannot be collected:\n{printed.getvalue()}")
    return collector.tests


def report(titles: Mapping[str, str], tests: Mapping[str, set[str]], list_all: bool) -> bool:
    """Print what is covered, and what is not to the error stream; whether nothing is missing or unknown."""
    if list_all:
        for scenario, title in titles.items():
            print(f"{scenario}: {title}")
            print("".join(f"    {test}\n" for test in sorted(tests.get(scenario, ()))), end="")
    for prefix, name in SECTIONS.items():
        ids = [scenario for scenario in titles if scenario.startswith(prefix)]
        found = set().union(*(tests.get(scenario, set()) for scenario in ids))
        covered = sum(bool(tests.get(scenario)) for scenario in ids)
        print(f"{name:18} {covered:3} of {len(ids):3} scenarios, {len(found):4} tests")
    missing = [scenario for scenario in titles if not tests.get(scenario)]
    unknown = sorted(tests.keys() - titles.keys())
    for scenario in missing:
        print(f"no test carries {scenario}: {titles[scenario]}", file=sys.stderr)
    for scenario in unknown:
        print(f"{scenario!r} is no scenario, but carried by {', '.join(sorted(tests[scenario]))}", file=sys.stderr)
    print(f"{len(titles) - len(missing)}/{len(titles)}")
    return not missing and not unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder of the tests")
    parser.add_argument("--scenarios", type=Path, default=ROOT / "tests" / "scenarios" / "scenarios.json")
    parser.add_argument("--list", action="store_true", help="print the tests of every scenario")
    arguments = parser.parse_args()
    titles = json.loads(arguments.scenarios.read_text(encoding="utf-8"))
    return 0 if report(titles, tests_by_scenario(arguments.tests), arguments.list) else 1


if __name__ == "__main__":
    sys.exit(main())
