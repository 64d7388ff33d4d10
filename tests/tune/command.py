"""The installed `layerzero-tune`, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXECUTABLE = str(Path(sys.executable).with_name("layerzero-tune"))
ROOT = Path(__file__).parents[2]
# Modules of kernels that the tests name are imported from the project's root; no table but the test's own is found.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("LAYERZERO_TABLES", "COLUMNS")} | {
    "PYTHONPATH": str(ROOT)
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


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a command whose output can be read when it has ended."""
    return subprocess.Popen(
        [EXECUTABLE, *map(str, arguments)],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
