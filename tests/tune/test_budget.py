"""`run --budget` and `--dry-run`: what fits is measured, the rest is named, and a measurement in flight is given up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import ContextError
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import Contest, ContestOutcome, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.budget import BudgetSpentError, Deadline, parse_duration
from layerzero_tune.search.device import LiveDevice
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.process import WorkerProcess
from tests.tune.command import CommandsHere, tune
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import contest_rows, norm
from tests.tune.tuning_runs import Seen, run_at

HOUR_S = 3600.0
NO_COMPILER = {"CXX": "no-such-compiler"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1h30m", 5400.0), ("2h5s", 7205.0), (" 1m30s ", 90.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-5m", "5m1h", "1.5h", "10 m", "ten minutes"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ContextError, match="10m or 1h30m"):
        parse_duration(text)


def test_what_is_in_flight_at_the_deadline_is_given_up() -> None:
    with pytest.raises(BudgetSpentError), Deadline.after(0.2).enforced():
        time.sleep(HOUR_S)
    time.sleep(0.3)  # no alarm is left behind


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    with Deadline.after(0.3).enforced():
        pass
    time.sleep(0.4)


def test_a_deadline_that_has_passed_ends_a_block_at_once() -> None:
    with pytest.raises(BudgetSpentError), Deadline.after(-5.0).enforced():
        time.sleep(HOUR_S)


class SlowDevice(RecordedDevice):
    """A recorded device whose contests of so many rows never end."""

    stuck = 64

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        if contest.context.rows == self.stuck:
            time.sleep(HOUR_S)
        return super().measure(contest)


def test_a_contest_that_outlasts_the_budget_is_skipped_and_named(tmp_path: Path) -> None:
    times = {"torch.rms_norm": 2.0, "torch.rms_norm.fused": 1.0}
    device = SlowDevice([row for size in (1, 8, 64) for row in contest_rows(norm(size), times)])
    seen = Seen()
    end = run_at(device, device.contexts, tmp_path, seen, Deadline.after(4.0))
    assert norm(64) in {planned.contest.context for planned in end.skipped}
    assert {row.context for row in ResultsStore(tmp_path).read().rows} == {
        finished.contest.context for finished in seen.finished_contests
    }
    assert seen.begun[-1].contest.context == norm(64)


@pytest.mark.slow
def test_a_worker_that_hangs_at_the_deadline_is_ended(tmp_path: Path) -> None:
    module = ("tests.tune.torture_kernels",)
    registry = Registry(
        kernel for name, kernel in load_kernels(module).items() if name in ("torch.rms_norm", "torture.hangs")
    )
    with WorkerProcess(module) as worker:
        device = LiveDevice(detect_device("cpu"), registry, MeasurementPolicy(), worker)
        end = run_at(device, [norm(4)], tmp_path, deadline=Deadline.after(20.0))
        assert worker.pid is None
    assert [planned.contest.context for planned in end.skipped] == [norm(4)]
    assert not list(tmp_path.glob("*.parquet"))


def test_a_budget_that_is_spent_measures_nothing_and_says_what_it_skipped(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = command("run", "--device", f"recorded:{recorded_results}", "--out", out, "--budget", "1s", "--json").json
    contests = len({row.contest_id for row in recorded_rows()})
    assert report["contests_measured"] + report["skipped"] == contests
    assert report["skipped"] > 0
    shown = command("run", "--device", f"recorded:{recorded_results}", "--out", out, "--budget", "1s")
    assert shown.status == 0
    assert "the budget is 1s: some" in shown.errors
    assert "skipped for want of time (" in shown.errors
    assert "the same command measures them" in shown.errors


def test_a_budget_that_is_long_enough_skips_nothing(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    words = ("run", "--device", f"recorded:{recorded_results}", "--ops", "norm.rms", "--out", tmp_path / "out")
    assert command(*words, "--budget", "5m", "--json").json["skipped"] == 0
    asked = tuple(row for row in recorded_rows() if row.context.operation == "norm.rms")
    assert ResultsStore(tmp_path / "out").read().rows == asked
    assert "skipped for want of time" not in command(*words, "--budget", "5m").errors


@pytest.mark.slow
@pytest.mark.alone
def test_a_live_run_keeps_its_budget_and_leaves_a_table(tmp_path: Path) -> None:
    results, start = tmp_path / "results", time.monotonic()
    done = tune("run", "--device", "cpu", "--ops", "norm,mlp", "--budget", "25s", "--out", results, **NO_COMPILER)
    taken_s = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert "skipped for want of time" in done.stderr
    assert "expected regret of a table at the points asked for" in done.stderr
    assert taken_s < 60.0  # all would take minutes
    if ResultsStore(results).contest_ids():  # beside busy neighbours the first contest may wait for longer than that
        compiled = tune("compile", results, "--out", tmp_path / "tables")
        assert compiled.returncode == 0, compiled.stderr


def test_a_dry_run_counts_and_estimates_and_leaves_no_trace(command: CommandsHere, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("run", "--device", "cpu", "--ops", "norm.rms", "--out", out, "--dry-run")
    plan = command(*words, "--json").json
    assert plan["contests"] == plan["operations"]["norm.rms"]["contests"] > 10
    assert "torch.rms_norm" in plan["kernels"]
    assert (plan["contests_held"], plan["skipped"]) == (0, 0)
    assert 1.0 < plan["seconds"] < 600.0
    shown = command(*words)
    assert f"{plan['contests']} contests of {len(plan['kernels'])} kernels, about" in shown.errors
    assert "nothing was measured" in shown.errors
    short = command(*words, "--budget", "15s", "--json").json
    assert 0 < short["contests"] < plan["contests"]
    assert short["contests"] + short["skipped"] == plan["contests"]
    assert short["seconds"] <= 15.0
    assert not out.exists()


def test_a_wrong_budget_is_an_error_of_the_command_line(command: CommandsHere, tmp_path: Path) -> None:
    ended = command("run", "--device", "cpu", "--out", tmp_path / "out", "--budget", "soon")
    assert ended.status != 0
    assert "--budget is 'soon', required a time above 0 such as 90s, 10m or 1h30m" in " ".join(ended.errors.split())
