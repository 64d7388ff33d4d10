"""The scripts over results: the benchmark of a million rows, in small, and the agreement of two tunings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.results.store import ResultsStore
from tests.tune.synthetic_results import grid, measured, norm

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def tuned(directory: Path, crossing: float, tie: float) -> Path:
    """Results of 40 norms: the fused kernel wins from a number of rows on, and another one always comes close to it."""
    store = ResultsStore(directory)
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    for context in grid(norm, (1, 4, 16, 64, 256, 1024, 4096, 16384), (512, 1024, 2048, 4096, 8192)):
        fused = 500.0 if (context.rows or 0) >= crossing else 2000.0
        times = {"torch.rms_norm": 1000.0, "torch.rms_norm.fused": fused, "torch.inductor.rms_norm": fused * tie}
        rows = measured([context], lambda _, times=times: times, noise=0.001)  # type: ignore[misc]
        # Of the code that is there, so that the tables made of them serve.
        store.append([replace(row, source_hash=kernel_source_hash(kernels[row.kernel_id])) for row in rows])
    store.compact()
    return directory


def test_the_benchmark_of_results_says_what_it_found() -> None:
    done = run_script("bench_results.py", "--rows", 600)
    assert done.stdout.startswith("600 rows give 1 static keys and "), done.stderr
    assert "| store | 0 MB | < 100 MB | yes |" in done.stdout
    assert done.returncode == 0, done.stdout


def test_a_benchmark_whose_figures_fall_short_fails() -> None:
    script = "import bench_results; bench_results.MAX_BYTES = 1.0; bench_results.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--rows", "50"], cwd=SCRIPTS, capture_output=True, text=True, check=False
    )
    assert "| store | 0 MB | < 100 MB | NO |" in done.stdout, done.stderr
    assert done.returncode == 1


def test_two_tunings_agree_where_they_pick_the_same_or_tied_plans(tmp_path: Path) -> None:
    one = tuned(tmp_path / "one", crossing=64, tie=1.01)
    same = run_script("agreement.py", one, one, "--held-out", 40)
    assert same.stdout == "40 held-out shapes: the same plan on 100.0%, the same or a tied one on 100.0%\n", same.stderr
    tied = tuned(tmp_path / "tied", crossing=64, tie=0.99)
    found = json.loads(run_script("agreement.py", one, tied, "--held-out", 40, "--json").stdout)
    assert found["shapes"] == 40
    assert found["same"] < 0.8
    assert found["tied"] == 1.0
    other = tuned(tmp_path / "other", crossing=1024, tie=1.01)
    found = json.loads(run_script("agreement.py", one, other, "--held-out", 40, "--json").stdout)
    assert found["same"] <= found["tied"] < 1.0
    assert len(found["rest"]) == round(40 * (1.0 - found["tied"]))
    assert {"torch.rms_norm"} < {kernel for each in found["rest"] for kernel in (each["first"][0], each["second"][0])}


def test_the_curves_of_regret_say_what_each_order_reaches(tmp_path: Path) -> None:
    results = tuned(tmp_path / "results", crossing=60, tie=2.0)
    figures, picture = tmp_path / "curves.json", tmp_path / "curves.svg"
    script = "regret_against_measurements.py"
    done = run_script(script, results, "--seeds", 2, "--out", figures, "--picture", picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("order      share  contests  seconds  regret  hit rate\nbudgeted")
    curves = json.loads(figures.read_text())["curves"]
    at = {(each["order"], each["share"]): each for each in curves}
    for name in ("budgeted", "grid", "random"):
        assert at[name, 1.0]["contests"] == 32  # a fifth of the 40 is held out
        assert at[name, 1.0]["regret"] == at["grid", 1.0]["regret"]
    assert at["budgeted", 0.25]["regret"] < at["grid", 0.25]["regret"]
    drawn = ElementTree.parse(picture).getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_the_committed_results_of_a_budgeted_run_hold_what_is_asked_of_them() -> None:
    done = run_script("check_budget_run.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("commit "), done.stderr
    assert "FAILS" not in done.stdout


def test_a_budgeted_run_that_falls_short_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(SCRIPTS / "results" / "h100_budget_5m", folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for shape in evaluation["shapes"]:
        shape["efficiency"] *= 0.95
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    rows = ResultsStore(folder / "faults").read().rows
    shutil.rmtree(folder / "faults")
    for contest_id in {row.contest_id for row in rows}:
        kept = [row for row in rows if row.contest_id == contest_id and row.status != "timeout"]
        ResultsStore(folder / "faults").append(kept)
    done = run_script("check_budget_run.py", folder)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILS")]
    assert len(failed) == 2  # the efficiency, and the fault that is not there


@pytest.mark.parametrize("share", [0, 1])
def test_buckets_are_taken_out_of_a_table(tmp_path: Path, share: int) -> None:
    results = tuned(tmp_path / "results", 256, 1.5)
    done = run_script("removed_buckets.py", results, tmp_path / "thinned", "--share", share)
    assert done.returncode == 0, done.stderr
    whole = compile_table(ResultsStore(results).read().rows, builtin_kernels())
    (folder,) = (tmp_path / "thinned_0").iterdir()
    entries = load_table_file(folder / "__init__.py").entries["norm.rms"].values()
    left = sum(bool(chain) for entry in entries for chain in entry.leaves)
    buckets = sum(bool(leaf.chain) for entry in whole.entries for leaf in entry.leaves())
    assert buckets > 1
    assert left == (0 if share else buckets)


def test_a_compiler_is_judged_on_the_contests_of_an_evaluation(tmp_path: Path) -> None:
    """Between the measured rows a table serves the kernel that wins around them, also where another one is faster."""
    results = tuned(tmp_path / "results", 256, 1.5)
    times = {"torch.rms_norm": 1000.0, "torch.rms_norm.fused": 1250.0, PUBLIC_CALL: 1.0}
    for context in grid(norm, (2, 2000), (1536,)):
        ResultsStore(tmp_path / "held-out").append(measured([context], lambda _: times, noise=0.001))
    done = run_script("cross_validate.py", results, "--on", tmp_path / "held-out", "--json")
    assert done.returncode == 0, done.stderr
    overall = json.loads(done.stdout)[-1]
    assert (overall["cells"], overall["hit_rate"], overall["slower_than_default"]) == (2, 1.0, 1)
    assert overall["efficiency_min"] == pytest.approx(0.8, rel=0.01)
