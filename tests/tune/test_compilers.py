"""Compiling ahead: processes beside the worker, what they leave to it, and what is never tried twice."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.kernels.triton_rows import ROW_TILINGS
from layerzero_runtime.registry import Registry
from layerzero_tune.command_line import run_devices
from layerzero_tune.measure.contest import Candidate, Contest, ContestOutcome, JobOutcome
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import LiveDevice
from layerzero_tune.worker import process
from layerzero_tune.worker.compile_job import CompileJob, compile_jobs
from layerzero_tune.worker.compilers import MAX_COMPILERS, Compilers, compiler_count
from layerzero_tune.worker.library_compilers import KEPT_ON_DISK
from layerzero_tune.worker.process import WorkerProcess
from layerzero_tune.worker.time_limits import TimeLimits
from tests.tune import compiling_kernels as compiling
from tests.tune.command import ROOT, CommandsHere
from tests.tune.contests import BRIEF, RMS, contest
from tests.tune.torture_kernels import RIGHT
from tests.tune.tuning_runs import run_at

MODULES = ("tests.tune.compiling_kernels", "tests.tune.torture_kernels")
H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
BFLOAT16 = SelectionContext(operation="norm.rms", dtype="bfloat16", rows=32, hidden_size=64)
HANGS_SOON = TimeLimits(shortest_s=20.0, compile_s=1.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPILING_FOLDER", str(tmp_path))
    return tmp_path


@pytest.fixture
def compilers() -> Iterator[Compilers]:
    with Compilers(MODULES, 2, limit_s=60.0) as found:
        yield found


def job(name: str, context: SelectionContext = RMS, **configuration: int) -> CompileJob:
    return CompileJob(context, f"compiling.{name}", configuration)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + compiling.PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes() -> list[str]:
    """The states of the processes that compile for this one (proc(5))."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and "compiler_main" in (folder / "cmdline").read_text():
                found.append(state)
    return found


def test_what_is_compiled_together_is_compiled_at_once(compilers: Compilers) -> None:
    """Each of the two loads waits for the other."""
    assert compilers.finish([job("meets", number=2), job("meets", BFLOAT16, number=2)]) == {}
    assert len(compiling.notes("meets")) == 2
    assert compilers.faults == {}


def test_a_load_is_made_once_for_all_sizes_and_again_for_other_static_features(compilers: Compilers) -> None:
    jobs = [job("notes"), job("notes", replace(RMS, rows=77)), job("notes", BFLOAT16)]
    compilers.finish(jobs)
    compilers.finish(jobs)
    assert len(compiling.notes("noted")) == 2


def test_compilers_are_the_least_important_and_see_no_gpu(compilers: Compilers) -> None:
    compilers.finish([job("notes")])
    assert compiling.notes("noted") == ["19 "]


def test_kernels_of_a_library_go_to_a_process_that_has_imported_it(compilers: Compilers) -> None:
    compilers.finish([CompileJob(RMS, f"{library}.meets", {"number": 2}) for library in ("first", "second")])
    for number, library in enumerate(("first", "second") * 3):
        compilers.finish([CompileJob(RMS, f"{library}.number", {"number": number})])
    first, second = ({*chain(*(compiling.notes(f"number-{n}") for n in range(start, 6, 2)))} for start in (0, 1))
    assert len(first) == len(second) == 1
    assert first != second


def test_a_library_that_takes_long_to_import_but_not_to_compile_is_imported_once(compilers: Compilers) -> None:
    compilers.finish([CompileJob(RMS, "slow.number", {"number": 0})])
    compilers.finish([CompileJob(RMS, "slow.number", {"number": number}) for number in range(1, 9)])
    assert len({*chain(*(compiling.notes(f"number-{number}") for number in range(9)))}) == 1


@pytest.mark.parametrize(
    ("capability", "architectures"), [((9, 0), ("sm_90a", "sm_90", "9.0a")), ((8, 6), ("sm_86", "sm_86", "8.6"))]
)
def test_libraries_compile_for_the_gpu_that_is_described(
    compilers: Compilers, capability: tuple[int, int], architectures: tuple[str, str, str]
) -> None:
    described = replace(H100, compute_capability=capability)
    compilers.finish([job("environment", replace(RMS, device=described))])
    [found] = map(json.loads, compiling.notes("environment"))
    names = ("CUTE_DSL_ARCH", "FLASH_ATTENTION_ARCH", "FLASHINFER_CUDA_ARCH_LIST")
    assert tuple(found[name] for name in names) == architectures
    assert found["FLASH_ATTENTION_NUM_SMS"] == "132"


@pytest.mark.parametrize("own", [None, "0"])
def test_compiled_code_is_kept_on_disk_unless_the_user_has_it_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    (name,) = KEPT_ON_DISK
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    with Compilers(MODULES, 1) as one, WorkerProcess(MODULES) as worker:
        one.finish([job("environment")])
        assert worker.run(contest("compiling.environment")).outcomes[0].status == "ok"
    in_compiler, in_worker = map(json.loads, compiling.notes("environment"))
    assert in_compiler[name] == in_worker[name] == (own or "1")


def test_what_a_contest_needs_goes_before_what_is_expected() -> None:
    with Compilers(MODULES, 1) as one:
        one.expect([job("takes_its_time", steps=20), job("takes_its_time", steps=21), job("raises")])
        wait_for(lambda: bool(compiling.notes("step")))
        one.finish([job("notes")])
        assert len(compiling.notes("step")) == 20, "what had begun is finished, what had not is put off"
        assert compiling.notes("raises") == []


@pytest.mark.parametrize("name", ["takes_its_time", "has_it_done"])
def test_while_they_are_paused_nothing_is_compiled_and_no_time_counts(name: str) -> None:
    with Compilers(MODULES, 1, limit_s=10.0) as one:
        one.expect([job(name, steps=150)])
        wait_for(lambda: bool(compiling.notes("step")))
        with one.paused():
            time.sleep(0.3)
            before = len(compiling.notes("step"))
            time.sleep(10.0)
            assert len(compiling.notes("step")) == before
            assert all(state == "T" for state in processes())
        assert one.finish([job(name, steps=150)]) == {}
        assert len(compiling.notes("step")) == 150


def test_what_a_compiler_has_started_ends_with_it() -> None:
    with Compilers(MODULES, 1) as one:
        one.expect([job("has_it_done", steps=10_000)])
        wait_for(lambda: bool(compiling.notes("step")))
    time.sleep(0.3)
    before = len(compiling.notes("step"))
    time.sleep(0.5)
    assert len(compiling.notes("step")) == before


def test_a_process_that_starts_meanwhile_is_paused_too() -> None:
    with Compilers(MODULES, 1) as one:
        with one.paused():
            one.expect([job("notes")])
            wait_for(lambda: processes() == ["T"])
            assert compiling.notes("noted") == []
        one.finish([job("notes")])
        assert len(compiling.notes("noted")) == 1


def test_what_fails_or_dies_is_left_to_the_worker(compilers: Compilers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert compilers.finish([job("raises"), job("raises", number=2), job("dies"), job("notes")]) == {}
    assert compilers.faults == {"compiling.raises": 2, "compiling.dies": 1}
    assert caplog.text.count("compiling.raises is left to the worker to compile, such as here: RuntimeError") == 1
    assert len(compiling.notes("noted")) == 1, "a process that was lost is replaced"


def test_a_compilation_that_hangs_is_ended_and_not_begun_with_other_features() -> None:
    with Compilers(MODULES, 1, limit_s=1.0) as one:
        others = [job("hangs"), job("hangs", BFLOAT16), job("notes")]
        found = one.finish(others)
    expected = JobOutcome("timeout", "no end of compiling within 1 s", hung_compiling=True)
    assert found == {others[0].key: expected, others[1].key: expected}
    assert len(compiling.notes("hangs")) == 1
    assert len(compiling.notes("noted")) == 1


def test_modules_that_cannot_be_imported_leave_all_to_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    with Compilers(("no.such.module",), 1) as one:
        assert one.finish([job("notes"), job("raises")]) == {}
    assert caplog.text.count("module 'no.such.module' of kernels cannot be imported") == 1


def test_no_process_is_left_behind() -> None:
    one = Compilers(MODULES, 2)
    one.expect([job("hangs"), job("notes")])
    wait_for(lambda: bool(compiling.notes("hangs")))
    one.close()
    assert processes() == []


def test_there_are_processors_left_for_the_worker_and_the_tuner() -> None:
    assert [compiler_count(number) for number in (1, 2, 3, 8, 64)] == [1, 1, 1, 6, MAX_COMPILERS]


def test_kernels_that_do_not_compile_have_no_jobs() -> None:
    point = contest("compiling.notes", "torture.right", "compiling.unknown")
    jobs = compile_jobs(point, compiling.by_id(RIGHT), H100)
    assert jobs == {0: CompileJob(RMS.with_device(H100), "compiling.notes", {})}


def live_device(
    worker: WorkerProcess, compilers: Compilers | None, *names: str, spec: DeviceSpec | None = None
) -> LiveDevice:
    """A device on which these kernels compete with the default."""
    kernels = compiling.by_id(*(kernel for kernel in builtin_kernels() if kernel.kernel_id == "torch.rms_norm"))
    registry = Registry(kernels[name] for name in ("torch.rms_norm", *names))
    return LiveDevice(spec or detect_device("cpu"), registry, BRIEF, worker, compilers=compilers)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_compilation_that_hangs_is_recorded_at_every_point_and_costs_its_limit_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_ahead: bool
) -> None:
    monkeypatch.setattr(process, "DEFAULT_LIMITS", HANGS_SOON)
    points = [RMS, replace(RMS, rows=48), BFLOAT16]
    with WorkerProcess(MODULES) as worker, ExitStack() as stack:
        compilers = stack.enter_context(Compilers(MODULES, 2, limit_s=1.0)) if is_ahead else None
        run_at(live_device(worker, compilers, "compiling.hangs", "compiling.notes"), points, folder / "results")
    rows = ResultsStore(folder / "results").read().rows
    hung = [row for row in rows if row.kernel_id == "compiling.hangs"]
    assert {row.context for row in hung} == set(points)
    assert {(row.status, row.message) for row in hung} == {
        ("timeout", "no end of compiling within 1 s" if is_ahead else "no progress for 1 s at load")
    }
    assert all(row.status == "ok" for row in rows if row.kernel_id != "compiling.hangs")
    assert len(compiling.notes("hangs")) == 1


class ClocklessWorker(WorkerProcess):
    """In place of a worker with a GPU: what it sees while it would measure."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look

    def run(self, contest: Contest, *others: object, **named: object) -> ContestOutcome:
        self.look()
        return ContestOutcome(tuple(JobOutcome("ok", screen_ns=1.0) for _ in contest.candidates), "2026")


def offered_by(device: LiveDevice, mode: str, configuration: dict[str, int]) -> list[Contest]:
    """A contest of the device's own kernel at each of two static keys."""
    contexts = [replace(context, mode=mode) for context in (RMS, BFLOAT16)]
    found = [device.contests(context)[0] for context in contexts]
    return [
        replace(one, candidates=(replace(one.candidates[1], configuration=configuration),), job_ids=one.job_ids[1:])
        for one in found
    ]


def test_a_contest_begins_compiled_and_beside_its_graphs_the_next_one_is_compiled(compilers: Compilers) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(len(compiling.notes("noted")))
        wait_for(lambda: len(compiling.notes("noted")) == 2)

    device = live_device(ClocklessWorker(look), compilers, "compiling.notes", spec=H100)
    first, second = offered_by(device, "graph", {})
    device.expect([second])
    device.measure(first)
    assert seen[0] >= 1


def test_a_device_begins_to_compile_what_it_is_asked_about(compilers: Compilers) -> None:
    device = live_device(ClocklessWorker(lambda: None), compilers, "compiling.takes_its_time", spec=H100)
    first, _ = offered_by(device, "graph", {"steps": 20})
    assert device.is_compiling(first)
    wait_for(lambda: not device.is_compiling(first))
    assert len(compiling.notes("step")) == 20


def test_beside_a_contest_in_which_the_host_is_timed_nothing_is_compiled(compilers: Compilers) -> None:
    seen: list[int] = []

    def look() -> None:
        wait_for(lambda: processes() == ["T", "T"])
        seen.append(len(compiling.notes("step")))
        time.sleep(1.0)
        seen.append(len(compiling.notes("step")))

    device = live_device(ClocklessWorker(look), compilers, "compiling.takes_its_time", spec=H100)
    first, second = offered_by(device, "eager", {"steps": 50})
    compilers.finish([job("meets", number=2), job("meets", BFLOAT16, number=2)])
    device.expect([second])
    device.measure(first)
    assert seen[0] == seen[1] >= 50
    compilers.finish(compile_jobs(second, compiling.by_id(), H100).values())
    assert len(compiling.notes("step")) == 100


def test_what_compiling_took_is_preparation_and_no_part_of_the_contest(compilers: Compilers) -> None:
    device = live_device(ClocklessWorker(lambda: None), compilers, "compiling.takes_its_time")
    (offered,) = device.contests(RMS)
    slow = replace(offered, candidates=(Candidate("compiling.takes_its_time", {"steps": 100}),), job_ids=("one",))
    _, outcome = device.measure(slow)
    assert outcome.preparation_s >= 1.0


def test_an_expected_contest_that_nobody_can_prepare_is_not_worked_out() -> None:
    device = live_device(ClocklessWorker(lambda: None), None, "compiling.notes")
    (offered,) = device.contests(RMS)
    asked: list[Contest] = []
    device.expect(asked.append(found) or found for found in (offered,))  # type: ignore[func-returns-value]
    device.measure(offered)
    assert asked == []


# A process that compiles what the first one did, and prints what Triton's cache said to each part of it.
AGAIN = """
import sys
from triton import knobs
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.worker.triton_target import compile_for
from tests.tune.test_compilers import H100, triton_jobs

compile_for(H100)
hits = []
knobs.compilation.listener = lambda *, cache_hit, **others: hits.append(cache_hit)
for job in triton_jobs():
    {kernel.kernel_id: kernel for kernel in builtin_kernels()}[job.kernel_id].load(job.context, job.configuration)
print(len(hits), sum(hits))
"""


def triton_jobs(device: DeviceSpec = H100) -> list[CompileJob]:
    rows = SelectionContext(operation="norm.rms", dtype="bfloat16", rows=4096, hidden_size=4096, device=device)
    decode = SelectionContext(
        operation="attention.cross",
        dtype="bfloat16",
        batch_size=4,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        seq_len_q=1,
        seq_len_k=4096,
        device=device,
    )
    tiles = {"block_width": 1024, "rows_per_program": 1, "num_warps": 4, "num_stages": 2}
    return [
        CompileJob(rows, "triton.rms_norm", {}),
        CompileJob(rows, "triton.rms_norm", {**tiles, "programs_per_multiprocessor": 2}),
        CompileJob(decode, "triton.split_kv", {}),
    ]


def test_code_of_triton_is_found_by_the_process_that_needs_it_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with Compilers((), 2) as two:
        assert two.finish(triton_jobs()) == {}
        assert two.faults == {}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}
    # Two forms of each: of a tiling's two rests, of a configuration's, of 2 and of the kernel that combines splits.
    assert len(before) == 2 * (2 * len(ROW_TILINGS) + 2 + 2 + 1)
    again = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split() == [str(len(before))] * 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")} == before


@pytest.mark.parametrize(("spec", "made"), [(H100, [()]), (detect_device("cpu"), [])])
def test_a_run_compiles_ahead_on_a_gpu_alone(
    command: CommandsHere, monkeypatch: pytest.MonkeyPatch, folder: Path, spec: DeviceSpec, made: list[tuple[str, ...]]
) -> None:
    asked: list[tuple[str, ...]] = []

    def noted(modules: tuple[str, ...]) -> Compilers:
        asked.append(modules)
        return Compilers(modules)

    monkeypatch.setattr(run_devices, "live_device", lambda name: spec)
    monkeypatch.setattr(run_devices, "Compilers", noted)
    ended = command("run", "--ops", "mlp.swiglu", "--preset", "quick", "--dry-run", "--json", "--out", folder / "out")
    assert ended.status == 0, ended.errors
    assert asked == made
