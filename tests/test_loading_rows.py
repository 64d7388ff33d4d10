"""The benchmark's rows of what a process pays before its first call are measured, whatever the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"
PROGRAM = """
import json
from dataclasses import asdict
from lookup_bench.loading import rows
print(json.dumps([asdict(row) for row in rows(processes=1)]))
"""


def test_every_row_is_measured_in_a_process_of_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=SCRIPTS, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert [(row["name"], row["asked"]) for row in rows] == [
        ("import layerzero_runtime", "< 20 ms"),
        ("loading a table of 6,000 buckets", "< 1.5 ms"),
        ("first select, a hit", "< 10 ms"),
        ("first select, a miss", "< 10 ms"),
        ("first select, a hit, torch imported before", "< 10 ms"),
    ]
    for row in rows:
        assert row["group"] == "loading"
        assert 0 < row["low"] <= row["ns"] <= row["high"]
        assert row["met"] == (row["ns"] < 1e6 * float(row["asked"].split()[1]))
        assert "ms of their own time" in row["note"]
