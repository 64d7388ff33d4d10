"""`layerzero-tune` as it was installed, in a process of its own; and in this one, where starting one costs too much."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.tables.table_files import TABLES_VARIABLE
from layerzero_tune.command_line.main import main
from layerzero_tune.measure.full_speed import PATIENCE_VARIABLE

EXECUTABLE = str(Path(sys.executable).with_name("layerzero-tune"))
ROOT = Path(__file__).parents[2]
# Tests do not wait for a run of the same user that measures on this machine.
RUNTIME_FOLDER = TemporaryDirectory(prefix="layerzero-tests-")
_OTHERS = (TABLES_VARIABLE, "COLUMNS", "OMP_WAIT_POLICY")
# Modules of kernels that the tests name are imported from the project's root; no table but the test's own is found. A
# run hardly waits for this machine's cores: what it does is tested, not how well it measures.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _OTHERS} | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "XDG_RUNTIME_DIR": RUNTIME_FOLDER.name,
    PATIENCE_VARIABLE: "0.5",
}


def tune(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [EXECUTABLE, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a command whose output can be read when it has ended."""
    return subprocess.Popen(
        [EXECUTABLE, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores interrupts, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.errors
        return json.loads(self.output)


class CommandsHere:
    """Commands run in this process; what they set in it is restored with `monkeypatch`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setenv(TABLES_VARIABLE, "")
        PUBLISHED.publish(None)

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr("sys.argv", ["layerzero-tune", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        output, errors = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, output, errors)
