"""Several runs into one folder: none measures what another has in flight, and a dead run holds nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.device import detect_device
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import Contest, ContestOutcome, JobOutcome, MeasurementPolicy
from layerzero_tune.results.leases import LEASE_S, LEASES, Leases
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import LiveDevice
from layerzero_tune.search.device_lock import alone_on
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.search.tuning import tune
from layerzero_tune.worker import WorkerProcess
from layerzero_tune.worker.process import GivenUpError
from tests.tune.command import start
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import DEVICE, contest_rows, norm
from tests.tune.tuning_runs import Seen, agenda_at

HOLDER = """
import sys, time
from pathlib import Path
from layerzero_tune.results.leases import Leases
with Leases(Path(sys.argv[1])).take("one") as is_ours:
    print(is_ours, flush=True)
    time.sleep(600.0)
"""


DEVICE_HOLDER = """
import time
from layerzero_tune.search.device_lock import alone_on
from tests.tune.synthetic_results import DEVICE
with alone_on(DEVICE):
    print("held", flush=True)
    time.sleep(600.0)
"""
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a process that is gone at the end."""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def is_free(folder: Path, contest_id: str = "one") -> bool:
    with Leases(folder).take(contest_id) as is_ours:
        return is_ours


def test_a_lease_is_held_until_its_process_is_gone(tmp_path: Path) -> None:
    with running(HOLDER, str(tmp_path)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not is_free(tmp_path)
        assert is_free(tmp_path, "another")
        written = json.loads((tmp_path / LEASES / "one").read_text())
        assert written["process"] == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert is_free(tmp_path)


def test_a_lease_ends_with_its_context_and_leaves_nothing(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    with leases.take("one") as first:
        assert first
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with pytest.raises(KeyboardInterrupt), leases.take("one"):
        raise KeyboardInterrupt
    assert is_free(tmp_path)
    leases.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age_s", "free"), [(LEASE_S - 60.0, False), (LEASE_S + 60.0, True)])
def test_a_lease_of_another_host_ends_by_time(age_s: float, free: bool, tmp_path: Path) -> None:
    lease = tmp_path / LEASES / "one"
    lease.parent.mkdir()
    lease.write_text('{"host": ["elsewhere.example", "another-boot"], "process": 7}')
    written = time.time() - age_s
    os.utime(lease, (written, written))
    assert is_free(tmp_path) == free
    assert lease.exists() != free


@pytest.mark.parametrize("host", [["elsewhere.example", BOOT], [socket.gethostname(), "before-the-restart"]])
def test_a_container_or_a_start_of_this_host_is_no_other_host(host: list[str], tmp_path: Path) -> None:
    lease = tmp_path / LEASES / "one"
    lease.parent.mkdir()
    lease.write_text(json.dumps({"host": host, "process": 7}))
    assert is_free(tmp_path)


def test_a_device_is_waited_for_and_free_once_its_holder_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    had = threading.Event()

    def measure() -> None:
        with alone_on(DEVICE):
            had.set()

    with running(DEVICE_HOLDER) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting = threading.Thread(target=measure)
        waiting.start()
        was_free = had.wait(0.8)
        holder.kill()
        assert had.wait(20.0)
        waiting.join()
        assert not was_free
    assert caplog.text.count("another run measures on") == 1


def test_who_waits_for_a_device_may_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    worker = WorkerProcess()
    worker.give_up()
    with alone_on(DEVICE), pytest.raises(GivenUpError), alone_on(DEVICE, worker.check):
        pass
    with alone_on(DEVICE, worker.check):
        pass


def test_a_contest_is_measured_alone_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "layerzero"
    seen: list[bool] = []

    class Watch(WorkerProcess):
        def run(self, contest: Contest, *arguments: Any, **options: Any) -> ContestOutcome:
            seen.append(is_free(folder, "cpu"))
            return ContestOutcome((JobOutcome("failed"),) * len(contest.candidates), "2026-01-01T00:00:00+00:00")

    spec = detect_device("cpu")
    device = LiveDevice(spec, Registry(builtin_kernels()), MeasurementPolicy(), Watch())
    (contest,) = device.contests(norm(1))
    device.measure(contest)
    assert seen == [False]
    assert is_free(folder, "cpu")


def test_a_contest_that_another_run_has_stored_is_not_measured_again(tmp_path: Path) -> None:
    rows = [row for size in (1, 2, 3) for row in contest_rows(norm(size), {"torch.rms_norm": 1000.0})]
    device, store = RecordedDevice(rows), ResultsStore(tmp_path)
    agenda = agenda_at(device, device.contexts, store)
    planned = agenda.next()
    assert planned is not None
    first = planned.contest
    second, third = (
        contest
        for context in device.contexts
        for contest in device.contests(context)
        if contest.contest_id != first.contest_id
    )
    other = ResultsStore(tmp_path)
    other.append(device.measure(second)[0])
    other.append(device.measure(third)[0])
    other.compact()
    seen = Seen()
    tune(device, agenda, store, seen)
    assert [finished.contest for finished in seen.finished_contests] == [first]
    assert len(store.contest_ids()) == 3


def test_two_runs_into_one_folder_share_its_contests(recorded_results: Path, tmp_path: Path) -> None:
    run = ("run", "--device", f"recorded:{recorded_results}", "--out", tmp_path / "results", "--json")
    runs = [start(*run) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], ended
    measured = [json.loads(output)["contests_measured"] for output, _ in ended]
    held = [json.loads(output)["contests_held"] for output, _ in ended]
    assert sum(measured) == len(ResultsStore(recorded_results).contest_ids())
    assert ResultsStore(tmp_path / "results").read().rows == recorded_rows()
    assert not (tmp_path / "results" / LEASES).exists(), held
