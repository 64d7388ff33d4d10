"""The benchmark of dispatch: a short run of it has every row, and it refuses to time what is no hit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
COMMITTED = json.loads((SCRIPTS / "results" / "bench_lookup.json").read_text(encoding="utf-8"))
COLUMNS = {
    "name": str,
    "asked": str,
    "ns": float | None,
    "ratio": float | None,
    "low": float | None,
    "high": float | None,
    "note": str,
    "met": bool | None,
    "group": str,
}
# What is asked of the project has a row each, with a bound.
ASKED = (
    "lookup, static key in hand and three sizes",
    "bound attention.cross.kernel(sizes), repeated sizes",
    "bound attention.cross.kernel(sizes), again and again in one thread",
    "bound norm.rms, hidden_size given: one numel, repeated shapes",
    "bound norm.rms, any width: one shape, repeated shapes",
    "bound attention.full, one shape, repeated shapes",
    "bound attention.causal, two shapes, repeated shapes",
    "bound attention.cross, two shapes, repeated shapes",
    "lz.attention, no_grad, repeated shapes",
    "lz.attention, gradients enabled, repeated shapes",
    "lz.rms_norm, no_grad, repeated shapes",
    "lz.rms_norm, gradients enabled, repeated shapes",
    "bound attention.cross.kernel(sizes), p99.9 over the median",
    "memory kept",
    "import layerzero_runtime",
    "loading a table of 6,000 buckets",
    "first select, a hit",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON file and the output of a run whose times say nothing."""
    path = tmp_path_factory.mktemp("lookup") / "rows.json"
    ended = run(str(SCRIPTS / "bench_lookup.py"), "--quick", "--json", str(path))
    assert ended.returncode == 0, ended.stderr
    return json.loads(path.read_text(encoding="utf-8")), ended.stdout


def test_a_short_run_has_the_rows_of_the_committed_results(quick: tuple[dict[str, Any], str]) -> None:
    results, _ = quick
    names = [row["name"] for row in results["rows"]]
    assert len(names) == len(set(names))
    assert set(names) == {row["name"] for row in COMMITTED["rows"]}, "measure again: scripts/bench_lookup.py --json"


def test_what_is_asked_has_a_bound_and_a_verdict(quick: tuple[dict[str, Any], str]) -> None:
    rows = {row["name"]: row for row in quick[0]["rows"]}
    for name in ASKED:
        assert rows[name]["asked"]
        assert rows[name]["met"] is not None


@pytest.mark.parametrize("source", ["quick", "committed"])
def test_the_file_says_what_was_measured_where(source: str, quick: tuple[dict[str, Any], str]) -> None:
    results = quick[0] if source == "quick" else COMMITTED
    assert results["device"]["platform"] == "cpu"
    assert {"python", "torch", "triton", "flashinfer"} == set(results["versions"])
    assert results["yardstick_ns"]["low"] <= results["yardstick_ns"]["median"] <= results["yardstick_ns"]["high"]
    assert results["table"].startswith("layerzero_tables.")
    assert {"measured_at", "commit", "dirty", "processors", "effort"} <= set(results)
    for row in results["rows"]:
        assert set(row) == set(COLUMNS)
        for column, value in row.items():
            assert isinstance(value, COLUMNS[column]), f"{row['name']}: {column} is {value!r}"
        assert row["group"] in ("floor", "ours", "tail", "memory", "loading", "peers")
        assert (row["met"] is None) or row["asked"]
        assert row["ns"] is not None or row["note"]
        if row["low"] is not None:
            assert row["low"] <= (row["ns"] if row["ratio"] is None else row["ratio"]) <= row["high"]


def test_the_table_that_is_printed_has_every_row(quick: tuple[dict[str, Any], str]) -> None:
    results, printed = quick
    for row in results["rows"]:
        assert f"| {row['name']} |" in printed


_REFUSED = """
from benchmarking.in_force import put_in_force, shipped_table, without_kernels
from layerzero_runtime.context import SelectionContext
from lookup_bench.answered import answered, guarded_kernels
from lookup_bench.calls import check, repeated

table = shipped_table()
put_in_force(table)
contexts = answered(table, "mlp.swiglu")
calls = repeated(contexts)


def verdict(calls):
    try:
        check(calls.public(), calls)
    except AssertionError as error:
        return str(error)
    return "fine"


print(verdict(calls))
with without_kernels(guarded_kernels(table)):
    print(verdict(calls))
    print(verdict(repeated([SelectionContext(operation="mlp.swiglu", dtype="float64", rows=2, hidden_size=8)])))
"""


def test_calls_of_a_real_kernel_and_misses_are_not_timed_as_dispatch() -> None:
    ended = run("-c", _REFUSED)
    real, idle, missed = ended.stdout.splitlines()
    assert "another kernel than the idle one" in real
    assert idle == "fine"
    assert "does not answer" in missed


_LEAKING = """
from benchmarking.timing import Loop
from lookup_bench.tail import KEPT_BYTES, _kept

kept = []
for call, function in (("f(size)", str), ("f(str(size))", kept.append)):
    loop = Loop(f"for size in calls: {call}", {"f": function, "calls": range(1000)}, 1000)
    print(_kept(loop, 5000) <= KEPT_BYTES)
"""


def test_memory_that_calls_keep_is_found() -> None:
    ended = run("-c", _LEAKING)
    assert ended.stdout.split() == ["True", "False"], ended.stderr


def test_repeats_below_one_are_refused() -> None:
    ended = run(str(SCRIPTS / "bench_lookup.py"), "--repeats", "0")
    assert ended.returncode == 2
    assert "required at least 1" in ended.stderr
