"""kill -9 at random instants: the same command continues to what a run gives that nothing disturbed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.tune.command import ENVIRONMENT, ROOT


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_that_is_killed_anywhere_continues_to_the_same_jobs() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "kill_at_random.py"), "--seeds", "5", "--first-seed", "1000"]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"5 instants \(tuner \d, worker \d, both \d\), [1-6] complete folders, 0 faults", last)
