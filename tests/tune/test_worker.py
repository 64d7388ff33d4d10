"""The worker process under kernels that crash, hang, exit and shout: each costs one measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError, LayerZeroError, SpecError
from layerzero_tune.evaluate import public_calls
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.measure.contest import COMPILING_CALL, LOAD, JobOutcome
from layerzero_tune.worker import WorkerProcess
from layerzero_tune.worker.kernels import load_kernels, with_loads_remembered
from layerzero_tune.worker.progress_board import ProgressBoard, Step
from layerzero_tune.worker.time_limits import TimeLimits
from tests.tune.contests import ATTENTION, BRIEF, RMS, contest

TORTURE = "tests.tune.torture_kernels"
LOSSY = "tests.tune.lossy_kernels"
LIMITS = TimeLimits(shortest_s=20.0)
BRIEF_LIMITS = TimeLimits(shortest_s=1.0)


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess((TORTURE,)) as process:
        yield process


def statuses(worker: WorkerProcess, *names: str, limits: TimeLimits = LIMITS) -> list[str]:
    return [job.status for job in run(worker, *names, limits=limits)]


def run(worker: WorkerProcess, *names: str, limits: TimeLimits = LIMITS) -> tuple[JobOutcome, ...]:
    return worker.run(contest(*(f"torture.{name}" for name in names)), limits).outcomes


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_contests_follow_each_other_in_one_process(worker: WorkerProcess) -> None:
    for _ in range(2):
        assert statuses(worker, "right", "inaccurate", "raises", "speaks") == ["ok", "wrong", "failed", "ok"]


def test_a_crash_costs_one_measurement(worker: WorkerProcess) -> None:
    default, dead, other = run(worker, "right", "segfaults", "right_too")
    assert [default.status, dead.status, other.status] == ["ok", "died", "ok"]
    assert default.samples_ns
    assert dead.message == "killed by SIGSEGV at first call; last output: about to read address 0"
    assert dead.samples_ns == ()


def test_kernels_whose_process_is_lost_once_get_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORTURE_FOLDER", str(tmp_path))
    with WorkerProcess((TORTURE, LOSSY)) as process:
        default, died, hung = run(process, "right", "dies_once", "hangs_once", limits=TimeLimits(shortest_s=2.0))
    assert [default.status, died.status, hung.status] == ["ok", "ok", "ok"]
    assert len(default.samples_ns) == BRIEF.rounds
    assert died.screen_ns is not None
    assert hung.screen_ns is not None


def test_a_second_death_is_final_where_a_kernel_comes_through_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORTURE_FOLDER", str(tmp_path))
    with WorkerProcess((TORTURE, LOSSY)) as process:
        company, dead, other = run(process, "company", "dies_beside_others", "right")
    assert [company.status, dead.status, other.status] == ["ok", "died", "ok"]
    assert company.samples_ns
    notes = [path.name.rpartition("-")[0] for path in tmp_path.iterdir()]
    assert sorted(notes) == ["dies_beside_others", "dies_beside_others", "dies_beside_others-alone"]


def test_a_worker_that_the_system_killed_for_its_memory_did_not_just_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("oom_kill_disable 7\noom_kill 3\n")
    monkeypatch.setattr("layerzero_tune.worker.process._VMSTAT", str(counter))
    monkeypatch.setenv("TORTURE_FOLDER", str(tmp_path))
    with WorkerProcess((TORTURE, LOSSY)) as process:
        default, killed_by_system = run(process, "right", "oom_killed")
    assert [default.status, killed_by_system.status] == ["ok", "out_of_memory"]
    assert killed_by_system.message == "killed by SIGKILL, the system being out of memory, at first call"


def test_memory_that_is_left_in_use_ends_the_process_after_the_contest() -> None:
    with WorkerProcess((TORTURE, LOSSY)) as process:
        run(process, "right")
        before = process.pid
        assert statuses(process, "right", "keeps_much") == ["ok", "ok"]
        assert process.pid is None
        run(process, "right")
        assert process.pid not in (None, before)


def test_the_last_words_are_those_of_the_contest(worker: WorkerProcess) -> None:
    run(worker, "speaks")
    assert run(worker, "killed")[0].message == "killed by SIGKILL at first call"


def test_the_default_may_die_too(worker: WorkerProcess) -> None:
    assert statuses(worker, "killed", "right", "inaccurate") == ["died", "ok", "wrong"]


def test_a_hang_is_ended_even_while_it_holds_the_interpreter(worker: WorkerProcess) -> None:
    start = time.monotonic()
    default, hung = run(worker, "right", "hangs", limits=BRIEF_LIMITS)
    assert default.status == "ok"
    assert hung.status == "timeout"
    assert hung.message == "no progress for 1 s at first call"
    assert time.monotonic() - start < 60


def test_the_limit_follows_from_the_work() -> None:
    limits = TimeLimits(shortest_s=5.0, longest_s=600.0, compile_s=300.0)

    def limit(name: str, context: SelectionContext, candidate: int | None = 1) -> float:
        return limits.of(Step(1, candidate, name), context)

    large = replace(RMS, rows=1 << 14, hidden_size=1 << 14)
    assert limit("round 1", RMS) == 5.0
    assert limit("round 1", large) == pytest.approx(10 * 2 * 8 * 2**28 / 1e9, rel=0.01)
    assert limit("round 1", replace(large, rows=1 << 24)) == 600.0
    long = replace(ATTENTION, seq_len_q=4096, seq_len_k=4096, num_heads=4)
    assert limit("warm-up", long) == pytest.approx(10 * 4 * 2 * 4 * 4096**2 * 16 / 1e9, rel=0.1)
    for name in (LOAD, COMPILING_CALL):
        assert limit(name, RMS) == 300.0
    assert limit("reference", RMS, None) == 600.0


def test_a_compilation_that_hangs_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORTURE_FOLDER", str(tmp_path))
    with WorkerProcess((TORTURE, LOSSY)) as process:
        default, hung = run(process, "right", "compiles_for_ever", limits=TimeLimits(compile_s=1.0))
    assert [default.status, hung.status] == ["ok", "timeout"]
    assert hung.message == "no progress for 1 s at load"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tuner_that_was_stopped_with_its_worker_blames_no_kernel(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED_TUNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORTURE_FOLDER": str(tmp_path)},
    ) as tuner:
        assert tuner.stdout is not None
        worker_pid = int(tuner.stdout.readline())
        while tuner.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.01)
        time.sleep(0.8)  # until it has seen that the kernel runs
        tuner.send_signal(signal.SIGSTOP)
        os.kill(worker_pid, signal.SIGSTOP)
        time.sleep(5.0)
        tuner.send_signal(signal.SIGCONT)
        time.sleep(0.3)  # it finds that nothing has happened for seconds
        os.kill(worker_pid, signal.SIGCONT)
        assert tuner.stdout.read().split() == ["ok", str(worker_pid)]


def test_the_limit_is_on_steps_and_not_on_the_contest(worker: WorkerProcess) -> None:
    """Forty rounds of more than 30 ms each in a contest whose steps may take 500 ms."""
    run(worker, "right")
    many = contest("torture.ten_times_slower", "torture.right", policy=replace(BRIEF, rounds=40))
    start = time.monotonic()
    assert [job.status for job in worker.run(many, TimeLimits(shortest_s=0.5)).outcomes] == ["ok", "ok"]
    assert time.monotonic() - start > 1.0


def test_errors_of_the_contest_itself_are_raised_and_the_worker_goes_on(worker: WorkerProcess) -> None:
    graph = contest("torture.right", context=replace(RMS, mode="graph"))
    with pytest.raises(ContextError, match="CPUs have 'eager' only"):
        worker.run(graph)
    assert statuses(worker, "right") == ["ok"]


def test_a_worker_killed_between_contests_is_replaced(worker: WorkerProcess) -> None:
    run(worker, "right")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    assert statuses(worker, "right") == ["ok"]


def test_ctrl_c_ends_the_worker_and_reaches_the_caller() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with WorkerProcess((TORTURE,)) as process:
            run(process, "right")
            pid = process.pid
            assert pid is not None
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                run(process, "hangs", limits=TimeLimits(shortest_s=60.0))
            assert wait_until_gone(pid)
            assert statuses(process, "right") == ["ok"]
    finally:
        signal.signal(signal.SIGINT, before)


STOPPED_TUNER = """
from layerzero_tune.worker import WorkerProcess
from layerzero_tune.worker.time_limits import TimeLimits
from tests.tune.contests import contest
with WorkerProcess(("tests.tune.torture_kernels", "tests.tune.lossy_kernels")) as worker:
    worker.run(contest("torture.right"))
    print(worker.pid, flush=True)
    print(worker.run(contest("torture.pauses"), TimeLimits(shortest_s=3.0)).outcomes[0].status, worker.pid)
"""

TUNER = """
import sys
import time
from layerzero_tune.worker import WorkerProcess
from layerzero_tune.worker.time_limits import TimeLimits
from tests.tune.contests import contest
worker = WorkerProcess(("tests.tune.torture_kernels",))
worker.run(contest("torture.right"))
print(worker.pid, flush=True)
if sys.argv[1] == "measuring":
    worker.run(contest("torture.right", "torture.hangs"), TimeLimits(shortest_s=600.0))
time.sleep(600.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal on a closed pipe is Linux's")
@pytest.mark.parametrize("state", ["measuring", "idle"])
def test_no_orphan_outlives_a_killed_tuner(state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TUNER, state],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as tuner:
        assert tuner.stdout is not None
        pid = int(tuner.stdout.readline())
        time.sleep(0.5)
        assert not wait_until_gone(pid, 0.1)
        tuner.kill()
        tuner.wait()
    assert wait_until_gone(pid)


def test_kernels_that_cannot_be_loaded_are_named() -> None:
    with WorkerProcess(("no_such_module",)) as process:
        for _ in range(2):
            with pytest.raises(SpecError, match="module 'no_such_module' of kernels cannot"):
                run(process, "right")


def test_a_worker_that_dies_while_it_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly_import.py").write_text("import os; print('no licence', flush=True); os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        WorkerProcess(("deadly_import",)) as process,
        pytest.raises(LayerZeroError, match="SIGABRT; last output: no licence"),
    ):
        run(process, "right")


def test_kernels_come_from_modules_and_ids_are_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torture.right" in load_kernels((TORTURE,))
    with pytest.raises(SpecError, match=r"declares kernel 'torture\.right' again"):
        load_kernels((TORTURE, TORTURE))
    with pytest.raises(SpecError, match="has no KERNELS"):
        load_kernels(("tests.tune.contests",))
    (tmp_path / "broken_kernels.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match="ZeroDivisionError"):
        load_kernels(("broken_kernels",))


def test_the_board_shows_the_last_step() -> None:
    board = ProgressBoard.create()
    assert board.read() == Step(0, None, "")
    board.report(3, "round 1")
    reader = ProgressBoard(os.dup(board.descriptor))
    assert reader.read() == Step(1, 3, "round 1")
    board.report(None, "x" * 100)
    assert reader.read() == Step(2, None, "x" * 48)
    board.close()
    reader.close()


def test_nothing_is_left_open() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with WorkerProcess((TORTURE,)) as process:
        run(process, "right", "killed")
    before = descriptors()
    with WorkerProcess((TORTURE,)) as process:
        run(process, "right", "killed")
    assert descriptors() == before


def test_a_kernel_is_loaded_once_per_static_features() -> None:
    loads: list[tuple[str, int | None]] = []

    def load(context: SelectionContext, configuration: Mapping[str, object]) -> Callable[..., object]:
        loads.append((context.dtype, context.rows))
        return lambda *arguments: context.dtype

    kernel = replace(load_kernels()["torch.rms_norm"], load=load)
    (remembered,) = with_loads_remembered({"torch.rms_norm": kernel}).values()
    small = SelectionContext(operation="norm.rms", dtype="float32", rows=2, hidden_size=8)
    first = remembered.load(small, {})
    assert remembered.load(replace(small, rows=3), {}) is first
    assert remembered.load(small, {"block": 2}) is not first
    assert remembered.load(replace(small, dtype="bfloat16", weight_dtype="bfloat16"), {})() == "bfloat16"
    assert loads == [("float32", 2), ("float32", 2), ("bfloat16", 2)]


def test_the_public_call_is_loaded_for_each_context() -> None:
    """It prepares what serves these sizes; under capture nothing else would."""
    loads: list[int | None] = []

    def load(context: SelectionContext, configuration: Mapping[str, object]) -> Callable[..., object]:
        loads.append(context.rows)
        return lambda *arguments: None

    kernels = load_kernels((public_calls.__name__,))
    loading = {PUBLIC_CALL: replace(kernels[PUBLIC_CALL], load=load)}
    (public,) = with_loads_remembered(loading).values()
    for rows in (2, 3, 2):
        public.load(SelectionContext(operation="norm.rms", dtype="float32", rows=rows, hidden_size=8), {})
    assert loads == [2, 3, 2]


def test_a_process_that_is_killed_while_it_starts_is_replaced() -> None:
    with WorkerProcess((TORTURE,)) as process:
        process.start()
        pid = process.pid
        assert pid is not None
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()  # importing torch takes longer
        (job,) = process.run(contest("torture.right")).outcomes
        assert process.pid != pid
    assert job.status == "ok"
