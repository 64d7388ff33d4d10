"""Who has to be alone is, between the tests of one process and of several."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from tests.turns import Turns

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("door", "room"):
        (tmp_path / name).touch()
    return tmp_path / "door", tmp_path / "room"


def wait_until_taken(path: Path) -> None:
    """Until somebody holds the lock on the file."""
    lock, deadline = os.open(path, os.O_RDONLY), time.monotonic() + 60.0
    while True:
        assert time.monotonic() < deadline
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(0.001)


def test_who_has_to_be_alone_waits_for_those_inside_and_goes_before_those_who_come_later(
    files: tuple[Path, Path],
) -> None:
    happened: list[str] = []

    def go(name: str, alone: bool) -> None:
        with Turns(*files).turn(alone):
            happened.append(f"{name} in")
            time.sleep(0.1)
            happened.append(f"{name} out")

    alone, later = Thread(target=go, args=("alone", True)), Thread(target=go, args=("later", False))
    with Turns(*files).turn(alone=False), Turns(*files).turn(alone=False):
        alone.start()
        wait_until_taken(files[0])  # it waits inside the door
        later.start()
        time.sleep(0.1)
        happened.append("both out")
    alone.join()
    later.join()
    assert happened == ["both out", "alone in", "alone out", "later in", "later out"]


# Their turns are apart from those of this run, whose turn this test has meanwhile.
CONFTEST = """
from pathlib import Path

from tests import turns

pytest_runtest_protocol = turns.pytest_runtest_protocol
turns.TURNS = turns.Turns(Path(__file__), Path(__file__).with_name("pytest.ini"))
"""


def test_of_the_tests_of_two_processes_those_marked_run_alone(tmp_path: Path) -> None:
    """Each file goes to one of the processes; the tests say when they began and ended."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    for name in ("one", "other"):
        (tmp_path / f"test_{name}.py").write_text(
            "import json, time, pytest\n\n\n"
            '@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.alone if n % 3 else ()) '
            "for n in range(9)])\n"
            "def test(number, request):\n"
            "    start = time.monotonic()\n    time.sleep(0.05)\n"
            f"    with open({str(tmp_path / name)!r}, 'a') as file:\n"
            "        file.write(json.dumps([bool(number % 3), start, time.monotonic()]) + '\\n')\n"
        )
    words = ("-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("one", "other")]
    assert [len(taken) for taken in found] == [9, 9]
    for is_alone, start, end in found[0]:
        for other_is_alone, other_start, other_end in found[1]:
            assert other_end < start or end < other_start or not (is_alone or other_is_alone)
