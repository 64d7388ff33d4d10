"""The whole way on this machine's CPU with its real kernels and clock: run, compile, explain, evaluate.

Only what holds whatever the times are is asserted. Without a C++ compiler, so that no minute goes into compiling.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from layerzero_runtime.device import detect_device
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import start, tune

WORKLOAD = """\
{"operation": "norm.rms", "dtype": "float32", "rows": 2, "hidden_size": 256}
{"operation": "norm.rms", "dtype": "float32", "rows": 2, "hidden_size": 1024}
{"operation": "norm.rms", "dtype": "float32", "rows": 32, "hidden_size": 256}
{"operation": "norm.rms", "dtype": "float32", "rows": 32, "hidden_size": 1024}
{"operation": "mlp.swiglu", "dtype": "float32", "rows": 2, "hidden_size": 512}
{"operation": "mlp.swiglu", "dtype": "float32", "rows": 32, "hidden_size": 512}
"""
FIGURES = {
    "n",
    "hit_rate",
    "efficiency_geomean",
    "efficiency_p10",
    "efficiency_min",
    "speedup_vs_default_geomean",
    "speedup_end_to_end_geomean",
    "slower_than_default",
}


NO_COMPILER = {"CXX": "no-such-compiler"}


@pytest.mark.slow
@pytest.mark.alone
def test_run_compile_explain_evaluate(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(WORKLOAD)
    results, tables, held_out = tmp_path / "results", tmp_path / "tables", tmp_path / "held-out"
    run = ("run", "--device", "cpu", "--workload", tmp_path / "w.jsonl", "--out", results, "--json")

    done = tune(*run, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    spec = detect_device("cpu")
    assert report["device"] == spec.to_dict()
    assert report["kinds"]["point"] == 6
    rows = ResultsStore(results).read().rows
    assert len({row.job_id for row in rows}) == 16  # beside busy neighbours some are measured again
    assert report["statuses"] == {"ok": len(rows)}
    assert {row.kernel_id for row in rows if row.context.rows == 2} == {
        "torch.rms_norm",
        "torch.rms_norm.fused",
        "torch.rms_norm.vector_norm",
        "torch.swiglu",
        "torch.swiglu.in_place",
    }
    for row in rows:
        assert row.relative_error is not None
        assert row.tolerance is not None
        assert row.relative_error <= row.tolerance
        assert (row.screen_ns or 0) > 100
        assert len(row.samples_ns) in (0, row.policy["rounds"])
        assert row.samples_ns or not row.is_default
    again = tune(*run, **NO_COMPILER)
    assert json.loads(again.stdout)["contests_measured"] == 0

    done = tune("compile", results, "--out", tables, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"] == 2
    module = (tables / spec.slug / "__init__.py").read_bytes()

    norm = ("--operation", "norm.rms", "--dtype", "float32", "--rows", 8, "--hidden-size", 512)
    done = tune("explain", "--tables", tables, "--device", "cpu", *norm, "--json")
    assert json.loads(done.stdout)["plan"]["source"] == "table"

    evaluate = ("evaluate", tables, "--results", results, "--out", held_out, "--held-out", 3, "--json")
    done = tune(*evaluate, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    *parts, over_all = report["summaries"]
    assert [(part["operation"], part["mode"], part["n"]) for part in parts] in (
        [("mlp.swiglu", "eager", 1), ("norm.rms", "eager", 2)],
        [("mlp.swiglu", "eager", 2), ("norm.rms", "eager", 1)],
    )
    assert over_all.keys() == FIGURES | {"operation", "mode"}
    assert (over_all["operation"], over_all["n"], over_all["hit_rate"]) == ("all", 3, 1.0)
    assert over_all["speedup_end_to_end_geomean"] > 0
    measured = {(row.context.rows, row.context.hidden_size) for row in rows}
    assert all(
        (shape["context"]["rows"], shape["context"]["hidden_size"]) not in measured for shape in report["shapes"]
    )
    assert len(ResultsStore(held_out).contest_ids()) >= 3

    done = tune(*evaluate, "--gate", "hit_rate>=0.5", "--gate", "n>=100", **NO_COMPILER)
    assert done.returncode == 2
    assert json.loads(done.stdout)["shapes"] == report["shapes"], "nothing is measured twice"
    assert "gate failed: n is 3, required >= 100.0" in done.stderr
    assert "hit_rate" not in done.stderr
    assert (tables / spec.slug / "__init__.py").read_bytes() == module


@pytest.mark.alone
def test_ctrl_c_ends_the_worker_too(tmp_path: Path) -> None:
    points = [
        json.dumps({"operation": "norm.rms", "dtype": "float32", "rows": rows, "hidden_size": hidden_size})
        for rows in range(2, 34)
        for hidden_size in (256, 512, 768, 1024)
    ]  # so many that none but the interruption ends the run
    (tmp_path / "w.jsonl").write_text("\n".join(points))
    out = tmp_path / "results"
    process = start("run", "--device", "cpu", "--workload", tmp_path / "w.jsonl", "--out", out, "--json", **NO_COMPILER)
    try:
        while process.poll() is None and not list(out.glob("contest-*.parquet")):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == ""
    assert "interrupted; finished contests are kept" in errors
    assert "Traceback" not in errors
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()
    assert 1 <= len(ResultsStore(out).contest_ids()) < len(points)
