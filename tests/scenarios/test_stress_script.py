"""The stress script: a short run of it, and that it finds what it looks for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from tests.scenarios.conftest import H100, attention, kernel, only

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "stress_selection.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is where the script is run
    spec = importlib.util.spec_from_file_location("stress_selection", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def brief_pauses() -> Iterator[None]:
    """The script shortens the breakers' pauses."""
    before = dispatch.health()._first_pause_s
    yield
    dispatch.health()._first_pause_s = before


@pytest.mark.scenario("CS-029")
@pytest.mark.scenario("CS-030")
@pytest.mark.scenario("CS-031")
@pytest.mark.scenario("CS-032")
def test_a_short_run_finds_nothing() -> None:
    """In so short a time memory is not settled yet: what it says of that is for the long run."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds", "4", "--seed", "7", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    summary = json.loads(ended.stdout)
    assert [found for found in summary["violations"] if "resident memory" not in found] == [], ended.stderr
    assert ended.returncode == bool(summary["violations"])
    assert summary["seed"] == 7
    for name in ("selections", "calls", "policy reloads", "kernels registered", "kernels broken", "kernels healed"):
        assert summary[name] > 0
    assert summary["snapshots published per s"] > 0


@pytest.mark.parametrize(
    ("policy", "kernel_id", "words"),
    [
        (Policy(denies=(Rule(kernel="any.*"),)), "any.attention", "is denied"),
        (Policy(allows=(Rule(kernel="other.*"),)), "any.attention", "is not allowed"),
        (Policy(locks=(Rule(kernel="other.*"),)), "any.attention", "locks ['other.attention']"),
        (Policy(), "narrow.attention", "has a limit"),
        (Policy(), "gone.attention", "is not registered"),
        (Policy(), "norm.only", "does not compute attention.full"),
        (Policy(), "failed.attention", "is broken"),
        (Policy(), None, "nothing was selected, legal are"),
        (Policy(), "any.attention", None),
        (Policy(locks=(Rule(kernel="narrow.*"),)), "any.attention", None),
        (Policy(denies=(Rule(operation="attention.*"),)), None, None),
    ],
)
def test_the_check_finds_what_a_snapshot_forbids(
    script: ModuleType, policy: Policy, kernel_id: str | None, words: str | None
) -> None:
    kernels = (
        *(kernel(f"{name}.attention") for name in ("any", "other", "failed")),
        kernel("narrow.attention", max_head_dim=32),
        kernel("norm.only", operations=("norm.rms",)),
    )
    with only(*kernels):
        dispatch.health().failed("failed.attention", "on purpose")
        lz.set_policy(policy)
        wrong = script.why_wrong(current_snapshot(), kernel_id, attention(device=H100))
    assert wrong is None if words is None else words in wrong


def test_a_selector_that_ignores_the_policy_is_found_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, brief_pauses: None
) -> None:
    select = Snapshot.select

    def select_by_priority(snapshot: Snapshot, context: Any) -> Any:
        return select(Snapshot(Registry(builtin_kernels()), snapshot.counters), context)

    monkeypatch.setattr(Snapshot, "select", select_by_priority)
    monkeypatch.setattr(script, "THREADS", 4)
    summary = script.run(20.0, 1)
    assert summary["seconds"] < 20
    assert any("was selected, it is" in found or "locks" in found for found in summary["violations"])
