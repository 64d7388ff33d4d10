"""A run over the recorded device: killed or interrupted anywhere, the same command continues to the same results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.errors import ResultsError
from layerzero_tune.compile.emit import EmittedTable, emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.recorded_device import RecordedDevice
from tests.tune.command import start
from tests.tune.command import tune as tune_command
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import ALL_KERNELS, contest_rows, norm
from tests.tune.tuning_runs import Seen, agenda_at, planned_at, run_at


@dataclass(frozen=True)
class Recording:
    """A recorded results folder, and what an uninterrupted run over it compiles to."""

    folder: Path
    contests: int
    table: EmittedTable

    def arguments(self, out: Path) -> tuple[object, ...]:
        return ("run", "--device", f"recorded:{self.folder}", "--out", out, "--json")


def table_of(results: Path) -> EmittedTable:
    return emit(compile_table(ResultsStore(results).read().rows, ALL_KERNELS))


@pytest.fixture(scope="module")
def recording(recorded_results: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    contests = len(ResultsStore(recorded_results).contest_ids())
    made = Recording(recorded_results, contests, table_of(recorded_results))
    whole = tmp_path_factory.mktemp("whole")
    done = tune_command(*made.arguments(whole))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["contests_measured"] == contests
    assert ResultsStore(whole).read().rows == recorded_rows()
    assert table_of(whole) == made.table
    return made


def stop_after(count: int, recording: Recording, out: Path, signal_number: int) -> tuple[int, str, str]:
    """Signal the run once it has stored so many contests; its exit status, output and standard error.

    A replay takes half a second. One that ended while this process was waiting for a core is started afresh.
    """
    for _ in range(5):
        process = start(*recording.arguments(out))
        try:
            while process.poll() is None and len(contest_files(out)) < count:
                time.sleep(0.001)
            process.send_signal(signal_number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode != 0:
            return process.returncode, output, errors
        shutil.rmtree(out)
    raise AssertionError("the run ended five times before the signal reached it")


def contest_files(out: Path) -> dict[str, int]:
    """The stored contests' files by name, with the time at which each was written."""
    if not out.exists():
        return {}
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(out) if entry.name.startswith("contest-")}


def rerun(recording: Recording, out: Path) -> dict[str, Any]:
    done = tune_command(*recording.arguments(out))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("count", [1, 40, 90])
def test_a_killed_run_continues_where_it_was(recording: Recording, tmp_path: Path, count: int) -> None:
    status, output, _ = stop_after(count, recording, tmp_path / "out", signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert output == ""
    stored = contest_files(tmp_path / "out")
    assert count <= len(stored) < recording.contests
    report = rerun(recording, tmp_path / "out")
    assert report["contests_held"] == len(stored)
    assert report["contests_measured"] == recording.contests - len(stored)
    assert report["quarantined"] == []
    assert ResultsStore(tmp_path / "out").read().rows == recorded_rows()
    assert table_of(tmp_path / "out") == recording.table
    assert rerun(recording, tmp_path / "out")["contests_measured"] == 0


def test_ctrl_c_says_that_finished_contests_are_kept(recording: Recording, tmp_path: Path) -> None:
    status, output, errors = stop_after(20, recording, tmp_path / "out", signal.SIGINT)
    assert status == 130
    assert output == ""
    assert "interrupted; finished contests are kept, the same command continues" in errors
    assert "Traceback" not in errors
    kept = ResultsStore(tmp_path / "out").contest_ids()
    assert 20 <= len(kept) < recording.contests
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert rerun(recording, tmp_path / "out")["contests_held"] == len(kept)
    assert table_of(tmp_path / "out") == recording.table


def test_a_damaged_file_is_reported_and_its_contest_measured_again(recording: Recording, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(5, recording, out, signal.SIGKILL)
    stored = sorted(contest_files(out))
    damaged = out / stored[2]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = tune_command(*recording.arguments(out))
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["contests_held"] == len(stored) - 1
    assert report["quarantined"] == [str(out / "quarantine" / stored[2])]
    assert f"{damaged} is damaged" in done.stderr
    assert ResultsStore(out).read().rows == recorded_rows()


def test_only_the_operations_asked_for_are_replayed(recording: Recording, tmp_path: Path) -> None:
    done = tune_command(*recording.arguments(tmp_path / "out"), "--ops", "norm.rms,mlp")
    assert done.returncode == 0, done.stderr
    rows = ResultsStore(tmp_path / "out").read().rows
    asked = ("norm.rms", "mlp.swiglu", "mlp.geglu")
    assert rows == tuple(row for row in recorded_rows() if row.context.operation in asked)
    assert {row.context.operation for row in rows} == set(asked)


# The same in this process.


def rows_at(*sizes: int, repeat: int = 0) -> list[Measurement]:
    times = {"torch.rms_norm": 2.0, "torch.rms_norm.fused": 1.0}
    return [row for size in sizes for row in contest_rows(norm(size), times, repeat=repeat)]


def test_what_is_stored_before_a_failure_stays(tmp_path: Path) -> None:
    """Ctrl-C after the third contest keeps the three, and the next run's plan has the rest."""
    device = RecordedDevice(rows_at(1, 2, 3, 4))
    store = ResultsStore(tmp_path)
    missing = planned_at(device, device.contexts, store).missing
    assert len(missing) == 4

    def interrupt(seen: Seen) -> None:
        if len(seen.finished_contests) == 3:
            raise KeyboardInterrupt

    seen = Seen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_at(device, device.contexts, tmp_path, seen)
    again = planned_at(device, device.contexts, store)
    assert again.found == 3
    measured = [finished.contest for finished in seen.finished_contests]
    assert again.missing == tuple(contest for contest in missing if contest not in measured)
    run_at(device, device.contexts, tmp_path)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 1
    assert agenda_at(device, device.contexts, store).next() is None


def test_a_recorded_device_offers_what_it_holds_and_nothing_else(tmp_path: Path) -> None:
    rows = [*rows_at(8), *rows_at(8, repeat=3), *rows_at(64)]
    device = RecordedDevice(rows[::-1])
    assert len(device.contests(norm(8))) == 2
    assert sorted(contest.repeat for contest in device.contests(norm(8))) == [0, 3]
    plan = planned_at(device, [norm(8), norm(9)], ResultsStore(tmp_path / "none"))
    assert len(plan.missing) == 2
    assert plan.without_candidates == (norm(9),)
    for contest in plan.missing:
        found, _ = device.measure(contest)
        assert list(found) == [row for row in rows if row.contest_id == contest.contest_id]
        assert found[0].is_default


def test_recordings_that_cannot_be_replayed_are_refused() -> None:
    with pytest.raises(ResultsError, match="these hold 0"):
        RecordedDevice([])
    other = replace(rows_at(2)[0], device={"platform": "cpu", "name": "Other CPU"})
    with pytest.raises(ResultsError, match="these hold 2"):
        RecordedDevice([*rows_at(1), other])
    partial = RecordedDevice(rows_at(1)[:1])
    with pytest.raises(ResultsError, match="does not follow from its jobs; measure this point again"):
        partial.contests(norm(1))
    older = RecordedDevice([replace(row, policy={"rounds": 3, "trials": 7}) for row in rows_at(1)])
    with pytest.raises(ResultsError, match="policy that this release does not know"):
        older.contests(norm(1))
