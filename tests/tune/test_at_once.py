"""Several devices of one product at once: each has one contest at a time, and together they do what one does."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import forget_devices
from layerzero_runtime.devices.nvml import Gpu, Inventory
from layerzero_runtime.errors import LayerZeroError
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.leases import LEASES
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.at_once import AtOnce
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device_lock import _visible_uuids, lock_name
from layerzero_tune.search.tuning import TuningEnd, tune
from tests.tune.clocked_device import ClockedDevice
from tests.tune.command import CommandsHere
from tests.tune.configured_kernels import PASSES
from tests.tune.described_gpus import H100, HANGS, described_gpus
from tests.tune.synthetic_results import norm
from tests.tune.tuning_runs import Seen, agenda_at

POINTS = [norm(rows, width) for rows in (1, 4, 16, 64, 256, 1024) for width in (512, 4096)]
RMS = "torch.rms_norm"


class Station(ClockedDevice):
    """One of several devices; remembers what it measured."""

    def __init__(self, kernels: Sequence[str] = (RMS, PASSES.kernel_id)) -> None:
        super().__init__(kernels)
        self.measured: list[Contest] = []
        self._is_busy = threading.Lock()

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        assert self._is_busy.acquire(blocking=False), "two contests on one device"
        try:
            self.meet()
            self.measured.append(contest)
            return super().measure(contest)
        finally:
            self._is_busy.release()

    def meet(self) -> None:
        """What happens in the middle of a contest."""


class Broken(Station):
    """A device that is lost after so many contests."""

    def __init__(self, healthy_for: int) -> None:
        super().__init__()
        self._healthy_for = healthy_for

    def meet(self) -> None:
        if len(self.measured) >= self._healthy_for:
            raise LayerZeroError("the worker process did not start: no such device")


def run_on(
    devices: Sequence[Station],
    folder: Path,
    seen: Seen | None = None,
    points: Sequence[SelectionContext] = POINTS,
) -> TuningEnd:
    store = ResultsStore(folder)
    with AtOnce(devices) as executor:
        return tune(devices[0], agenda_at(devices[0], points, store), store, seen, executor=executor)


def jobs_in(folder: Path, *, with_searches: bool = True) -> set[tuple[str, str, str]]:
    rows = ResultsStore(folder).read().rows
    return {(row.contest_id, row.job_id, row.status) for row in rows if with_searches or not row.is_search}


def test_three_devices_measure_three_contests_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=30.0)

    class Meeting(Station):
        def meet(self) -> None:
            together.wait()

    devices = [Meeting((RMS,)) for _ in range(3)]
    run_on(devices, tmp_path)
    assert [len(device.measured) for device in devices] == [len(POINTS) // 3] * 3


def test_the_jobs_done_are_those_of_one_device(tmp_path: Path) -> None:
    run_on([Station((RMS,))], tmp_path / "one")
    seen = Seen()
    devices = [Station((RMS,)) for _ in range(4)]
    run_on(devices, tmp_path / "four", seen)
    assert jobs_in(tmp_path / "four") == jobs_in(tmp_path / "one")
    assert len(seen.finished_contests) == len(seen.begun) == sum(len(device.measured) for device in devices)
    assert not (tmp_path / "four" / LEASES).exists()


@pytest.mark.parametrize(("count", "points"), [(3, POINTS), (5, POINTS[:2])])
def test_searches_end_and_each_stays_on_its_device(
    count: int, points: Sequence[SelectionContext], tmp_path: Path
) -> None:
    devices = [Station() for _ in range(count)]
    run_on(devices, tmp_path, points=points)
    rows = ResultsStore(tmp_path).read().rows
    assert {row.context for row in rows if not row.is_search} == set(points)
    searched = {row.context for row in rows if row.is_search}
    homes = Counter(
        context for device in devices for context in {found.context for found in device.measured if found.is_search}
    )
    assert homes == dict.fromkeys(searched, 1)


def test_a_device_that_is_lost_leaves_and_another_measures_its_contest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = [Station(), Broken(2), Station()]
    seen = Seen()
    run_on(devices, tmp_path, seen)
    assert len(devices[1].measured) == 2
    assert {row.context for row in ResultsStore(tmp_path).read().rows if not row.is_search} == set(POINTS)
    measured = Counter(finished.contest.contest_id for finished in seen.finished_contests)
    assert set(measured.values()) == {1}
    assert caplog.text.count("cannot measure any more and leaves the run, 2 of its kind are left") == 1


@pytest.mark.parametrize("healthy_for", [(2,), (2, 0), (1, 1, 0)])
def test_the_loss_of_the_last_device_ends_the_run_and_keeps_what_was_measured(
    healthy_for: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(LayerZeroError, match="did not start"):
        run_on([Broken(count) for count in healthy_for], tmp_path)
    assert len(ResultsStore(tmp_path).contest_ids()) == 2
    assert list((tmp_path / LEASES).glob("*")) == []


def test_a_contest_that_two_devices_fail_at_ends_the_run(tmp_path: Path) -> None:
    failed: list[Contest] = []

    class Picky(Station):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            if contest.context == POINTS[5]:
                failed.append(contest)
                raise LayerZeroError("the worker failed at a contest")
            return super().measure(contest)

    devices = [Picky() for _ in range(5)]
    with pytest.raises(LayerZeroError, match="failed at a contest"):
        run_on(devices, tmp_path)
    assert len(failed) == 2


@pytest.mark.slow
@pytest.mark.alone
def test_a_worker_that_is_killed_is_replaced_and_the_other_goes_on(tmp_path: Path) -> None:
    devices, workers = described_gpus(2, RMS)
    first = workers[0]
    killed: list[int] = []

    def kill(seen: Seen) -> None:
        if not killed and first.pid is not None:
            killed.append(first.pid)
            os.kill(first.pid, signal.SIGKILL)

    store, points = ResultsStore(tmp_path), POINTS[:3]
    with AtOnce(devices) as executor, workers[0], workers[1]:
        tune(devices[0], agenda_at(devices[0], points, store), store, Seen(kill), executor=executor)
        assert first.pid not in killed
        assert len({worker.pid for worker in workers} - {None}) == 2
    rows = store.read().rows
    assert {row.context for row in rows} == set(points)
    assert {row.status for row in rows} == {"ok"}
    assert {row.device["name"] for row in rows} == {H100.name}


@pytest.mark.slow
def test_what_is_in_flight_at_the_deadline_is_given_up_on_every_device(tmp_path: Path) -> None:
    devices, workers = described_gpus(2, RMS, HANGS.kernel_id)
    store = ResultsStore(tmp_path)
    start = time.monotonic()
    with AtOnce(devices) as executor:
        agenda = agenda_at(devices[0], POINTS[:2], store)
        end = tune(devices[0], agenda, store, deadline=Deadline.after(15.0), executor=executor)
    assert [worker.pid for worker in workers] == [None, None]
    assert {planned.contest.context for planned in end.skipped} == set(POINTS[:2])
    assert time.monotonic() - start < 60.0  # a hang alone would take as long again


GPU = Gpu(name=H100.name, uuid="GPU-0", compute_capability=(9, 0), multiprocessors=132)
WORKLOAD = '{"operation": "norm.rms", "dtype": "float32", "rows": 8, "hidden_size": 64}\n'


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ((), ""),
        (
            (replace(GPU, name="NVIDIA A100-SXM4-80GB"),),
            "this host has cuda:0 NVIDIA H100 80GB HBM3, cuda:1 NVIDIA A100-SXM4-80GB; measure each with "
            "--device cuda:N and an --out of its own",
        ),
        ((replace(GPU, multiprocessors=114),), r"cuda:1 NVIDIA H100 80GB HBM3 \(multiprocessors 114\)"),
    ],
)
def test_all_takes_gpus_of_one_product(
    others: tuple[Gpu, ...], message: str, command: CommandsHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tuple(replace(gpu, uuid=f"GPU-{index}") for index, gpu in enumerate((GPU, GPU, *others)[-2:]))
    monkeypatch.setattr("layerzero_runtime.devices.nvml.read_inventory", lambda library: Inventory(gpus))
    (tmp_path / "w.jsonl").write_text(WORKLOAD)
    forget_devices()
    try:
        words = ("run", "--device", "all", "--workload", tmp_path / "w.jsonl", "--out", tmp_path / "out", "--dry-run")
        ended = command(*words)
    finally:
        forget_devices()
    assert ended.status == (1 if message else 0), ended.errors
    assert re.search(message or "2 contests .1 in searches of configurations. of", " ".join(ended.errors.split()))


def test_all_says_that_there_is_no_gpu(command: CommandsHere, tmp_path: Path) -> None:
    ended = command("run", "--device", "all", "--out", tmp_path / "out")
    assert ended.status == 1
    assert "there is no device cuda:0" in ended.errors
    assert "use device cpu" in ended.errors


def test_a_gpu_has_one_lock_whatever_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(replace(GPU, uuid=f"GPU-{digit * 8}", multiprocessors=132) for digit in "0123")
    monkeypatch.setattr("layerzero_tune.search.device_lock.read_inventory", lambda library: Inventory(gpus))
    monkeypatch.setattr("layerzero_tune.search.device_lock._visible_uuids", _visible_uuids.__wrapped__)
    second = replace(H100, index=1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone = lock_name(second)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert lock_name(H100) == alone == "GPU-11111111"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    assert (lock_name(H100), lock_name(second)) == ("GPU-33333333", "GPU-22222222")
    assert lock_name(replace(H100, index=7)) == "cuda-7"
