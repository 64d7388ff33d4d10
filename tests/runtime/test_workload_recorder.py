"""`record_workload`: what production asks for, as a workload file, bounded and never in the way of a call."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.errors import ContextError
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.serving.workload_recorder import WorkloadRecorder
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.workload.lines import read_workload
from tests.runtime.call_examples import CALLS, each_call
from tests.runtime.conftest import tables_in_force
from tests.runtime.public_calls import PublicCall
from tests.tune.command import tune

LONG_S = 60.0
# Measured cells of the synthetic table, and one outside its range.
HITS, MISS = ((1, 32), (256, 512)), (1000, 32)


def context(rows: int = 4, **changes: Any) -> SelectionContext:
    given: dict[str, Any] = {"operation": "mlp.swiglu", "dtype": "float32", "rows": rows, "hidden_size": 64}
    return SelectionContext(**(given | changes))


def swiglu(rows: int, hidden_size: int) -> None:
    gate, up = torch.randn(rows, hidden_size), torch.randn(rows, hidden_size)
    torch.testing.assert_close(lz.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def recorded(path: Path) -> dict[tuple[Any, ...], float]:
    """Weights by rows and hidden size."""
    return {(line.context.rows, line.context.hidden_size): line.weight for line in read_workload(path)}


@pytest.fixture(autouse=True)
def no_recording() -> Iterator[None]:
    yield
    lz.record_workload(None)
    lz.set_policy(None)
    names = ("layerzero-workload",)
    for thread in [thread for thread in threading.enumerate() if thread.name in names]:
        thread.join(LONG_S)
        assert not thread.is_alive()


@pytest.fixture
def recorder_at(tmp_path: Path) -> Iterator[Callable[..., tuple[WorkloadRecorder, CounterGroup]]]:
    """Makes recorders of one's own, that write to `tmp_path / "w.jsonl"`."""
    made: list[WorkloadRecorder] = []

    def make(**settings: Any) -> tuple[WorkloadRecorder, CounterGroup]:
        counters = CounterGroup()
        made.append(WorkloadRecorder(tmp_path / "w.jsonl", counters=counters, **settings))
        return made[-1], counters

    yield make
    for recorder in made:
        recorder.close()


def test_misses_are_recorded_with_their_counts(snapshot: Snapshot, tmp_path: Path) -> None:
    lz.record_workload(str(tmp_path / "w.jsonl"))
    for _ in range(3):
        swiglu(*MISS)
    swiglu(2000, 32)
    for sizes in HITS * 2:
        swiglu(*sizes)
    lz.record_workload(None)
    swiglu(*MISS)
    assert recorded(tmp_path / "w.jsonl") == {MISS: 3, (2000, 32): 1}
    # The most frequent first.
    assert json.loads((tmp_path / "w.jsonl").read_text().splitlines()[0])["weight"] == 3


def test_hits_are_recorded_if_asked_every_one_of_them(snapshot: Snapshot, tmp_path: Path) -> None:
    lz.record_workload(str(tmp_path / "w.jsonl"), hits=True)
    for _ in range(3):
        for sizes in (*HITS, MISS):
            swiglu(*sizes)
    lz.record_workload(None)
    assert recorded(tmp_path / "w.jsonl") == dict.fromkeys((*HITS, MISS), 3)


def test_calls_that_a_policy_decides_one_by_one_are_hits_where_the_table_serves_them(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    """A rule on sizes has every call of its operation described."""
    lz.set_policy(
        Policy(denies=(Rule(operation="mlp.swiglu", kernel="no.such", when=(Limit("rows", "at_least", 9),)),))
    )
    lz.record_workload(str(tmp_path / "w.jsonl"))
    swiglu(*HITS[0])
    swiglu(*MISS)
    lz.record_workload(str(tmp_path / "with_hits.jsonl"), hits=True)
    swiglu(*HITS[0])
    swiglu(*MISS)
    lz.record_workload(None)
    assert recorded(tmp_path / "w.jsonl") == {MISS: 1}
    assert recorded(tmp_path / "with_hits.jsonl") == {HITS[0]: 1, MISS: 1}


@each_call
def test_every_operation_is_recorded_as_the_tuner_reads_it(call: PublicCall, tmp_path: Path) -> None:
    with tables_in_force(None):
        lz.record_workload(str(tmp_path / "w.jsonl"))
        call.run()
        lz.record_workload(None)
    [line] = read_workload(tmp_path / "w.jsonl")
    assert line.weight == 1
    assert line.context == call.context


def test_shapes_are_recorded_and_nothing_else(snapshot: Snapshot, tmp_path: Path) -> None:
    """No value of a tensor, and no tensor kept alive."""
    lz.record_workload(str(tmp_path / "w.jsonl"), hits=True)
    gate = torch.full((MISS[0], MISS[1]), 0.123456)
    reference = weakref.ref(gate)
    lz.swiglu(gate, gate)
    del gate
    gc.collect()
    assert reference() is None
    lz.record_workload(None)
    [line] = (tmp_path / "w.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "operation": "mlp.swiglu",
        "dtype": "float32",
        "mode": "eager",
        "rows": MISS[0],
        "hidden_size": MISS[1],
        "weight": 1,
    }


def test_features_that_a_context_may_have_are_read_back(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, _ = recorder_at()
    attention = SelectionContext(
        operation="attention.causal",
        dtype="bfloat16",
        batch_size=2,
        seq_len_q=3,
        seq_len_k=9,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        v_head_dim=32,
        causal_alignment="bottom_right",
        layout="bshd",
        attn_mask="float",
        dropout_p=0.1,
        scale=0.3,
        requires_grad=True,
        requires_deterministic=True,
        is_contiguous=False,
        stride_last_dim=2,
        quant_format="fp8",
        output_dtype="float32",
        workspace_limit=0,
    )
    norm = SelectionContext(
        operation="norm.layer", dtype="bfloat16", rows=3, hidden_size=5, weight_dtype="float32", has_bias=True
    )
    for each in (attention, norm):
        recorder.record(each)
    recorder.close()
    assert {line.context for line in read_workload(tmp_path / "w.jsonl")} == {attention, norm}


def test_captured_calls_are_calls_of_mode_graph(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, _ = recorder_at()
    recorder.record(context(is_cuda_graph_capturing=True))
    recorder.record(context(mode="graph"))
    recorder.close()
    [line] = read_workload(tmp_path / "w.jsonl")
    assert (line.context, line.weight) == (context(mode="graph"), 2)


@pytest.mark.slow
def test_the_tuner_measures_what_was_recorded(snapshot: Snapshot, tmp_path: Path) -> None:
    lz.record_workload(str(tmp_path / "w.jsonl"))
    swiglu(*MISS)
    lz.record_workload(None)
    done = tune(
        *("run", "--device", "cpu", "--workload", tmp_path / "w.jsonl", "--out", tmp_path / "results", "--json"),
        CXX="no-such-compiler",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kinds"]["point"] == 1
    rows = ResultsStore(tmp_path / "results").read().rows
    assert {(row.context.operation, row.context.rows, row.context.hidden_size) for row in rows} == {
        ("mlp.swiglu", *MISS)
    }


def test_shapes_beyond_the_bound_are_dropped_and_counted(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, counters = recorder_at(max_contexts=10)
    for _ in range(2):
        for rows in range(1, 16):
            recorder.record(context(rows))
    assert dict(counters) == {"workload_dropped": 10}
    recorder.close()
    assert recorded(tmp_path / "w.jsonl") == {(rows, 64): 2 for rows in range(1, 11)}


def test_a_call_never_waits(recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path) -> None:
    """While another thread's call is being counted, this one is dropped."""
    recorder, counters = recorder_at()

    def recorded_under(lock: threading.Lock) -> bool:
        calling = threading.Thread(target=recorder.record, args=(context(),), daemon=True)
        with lock:
            calling.start()
            calling.join(10.0)
            return not calling.is_alive()

    assert recorded_under(recorder._lock)
    assert dict(counters) == {"workload_dropped": 1}
    # Nor does it wait for the disk.
    assert recorded_under(recorder._writing)
    recorder.close()
    assert recorded(tmp_path / "w.jsonl") == {(4, 64): 1}


def test_threads_together_lose_nothing_that_is_not_counted(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, counters = recorder_at(flush_s=0.001)

    def record() -> None:
        for number in range(500):
            recorder.record(context(1 + number % 7))

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    recorder.close()
    assert sum(recorded(tmp_path / "w.jsonl").values()) + dict(counters).get("workload_dropped", 0) == 8 * 500


def test_what_is_new_is_written_while_the_process_runs(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, _ = recorder_at(flush_s=0.01)
    file = tmp_path / "w.jsonl"
    for number in (1, 2):
        recorder.record(context())
        wait_until(lambda number=number: file.stat().st_size > 0 and recorded(file) == {(4, 64): number})  # type: ignore[misc]
    before = file.stat().st_mtime_ns
    threading.Event().wait(0.1)
    # Nothing is new.
    assert file.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["w.jsonl"]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(int(LONG_S * 100)):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to pass")


def test_a_file_stays_as_it_is_until_there_is_something_to_write(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    file = tmp_path / "w.jsonl"
    file.write_text("# of an earlier process\n")
    recorder, _ = recorder_at()
    recorder.close()
    assert file.read_text() == "# of an earlier process\n"
    recorder, _ = recorder_at()
    recorder.record(context())
    recorder.close()
    assert recorded(file) == {(4, 64): 1}


def test_nothing_is_recorded_after_the_end(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder, counters = recorder_at()
    recorder.record(context())
    recorder.close()
    recorder.record(context())
    recorder.close()
    assert recorded(tmp_path / "w.jsonl") == {(4, 64): 1}
    assert dict(counters) == {}


def test_a_path_that_cannot_be_written_is_an_error_at_once_and_changes_nothing(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    lz.record_workload(str(tmp_path / "w.jsonl"))
    for path in (tmp_path, tmp_path / "missing" / "w.jsonl"):
        with pytest.raises(ContextError, match=r"cannot write the workload to .*; choose another path"):
            lz.record_workload(str(path))
    swiglu(*MISS)
    lz.record_workload(None)
    assert recorded(tmp_path / "w.jsonl") == {MISS: 1}
    assert [path.name for path in tmp_path.iterdir()] == ["w.jsonl"]


def test_a_disk_that_fails_later_is_counted_and_made_up_for(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, counters = recorder_at()
    recorder.record(context())
    (tmp_path / "w.jsonl").unlink()
    (tmp_path / "w.jsonl").mkdir()  # where the file should go, a folder has come
    for _ in range(3):
        recorder._write_news()
    assert dict(counters) == {"workload_unwritten": 3}
    assert sum("cannot write the workload" in record.getMessage() for record in caplog.records) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.jsonl"]
    (tmp_path / "w.jsonl").rmdir()
    recorder.close()
    assert recorded(tmp_path / "w.jsonl") == {(4, 64): 1}


def test_the_end_of_the_process_writes(tmp_path: Path) -> None:
    done = in_a_process("lz.record_workload(path)\nmiss()\nmiss()\n", tmp_path)
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "w.jsonl") == {(3, 5): 2}


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    code = """
from layerzero_runtime import dispatch
lz.record_workload(path)
miss()
dispatch._sources.recorder._write_news()
miss()
os.kill(os.getpid(), 9)
"""
    assert in_a_process(code, tmp_path).returncode == -signal.SIGKILL
    assert recorded(tmp_path / "w.jsonl") == {(3, 5): 1}


def test_a_forked_process_leaves_the_file_to_its_parent(tmp_path: Path) -> None:
    """Even one that was forked while a call was being counted ends in order."""
    code = """
import threading
from layerzero_runtime import dispatch
lz.record_workload(path)
miss()
recorder = dispatch._sources.recorder
counting, counted = threading.Event(), threading.Event()
def count():
    with recorder._lock:
        counting.set()
        counted.wait()
thread = threading.Thread(target=count)
thread.start()
counting.wait()
child = os.fork()
if child == 0:
    miss()
    lz.record_workload(path + ".child")
    miss()
    lz.record_workload(None)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert not open(path).read()
counted.set()
thread.join()
miss()
"""
    done = in_a_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "w.jsonl") == {(3, 5): 2}
    assert recorded(tmp_path / "w.jsonl.child") == {(3, 5): 1}


def in_a_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code that may call `miss()`, a call of 3 x 5 elements that no table answers, and finds its `path`."""
    start = """
import os, sys
import torch
import layerzero_runtime as lz
torch.set_num_threads(1)  # of which no thread is missing in a forked process
path = sys.argv[1]
def miss():
    lz.geglu(torch.ones(3, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64))
"""
    return subprocess.run(
        [sys.executable, "-c", start + code, str(folder / "w.jsonl")],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )


def test_an_ended_recorder_is_let_go(
    recorder_at: Callable[..., tuple[WorkloadRecorder, CounterGroup]], tmp_path: Path
) -> None:
    recorder = WorkloadRecorder(tmp_path / "w.jsonl", counters=CounterGroup())
    recorder.record(context())
    recorder.close()
    reference = weakref.ref(recorder)
    for thread in threading.enumerate():
        if thread.name == "layerzero-workload":
            thread.join(LONG_S)
    del recorder
    gc.collect()
    assert reference() is None


def test_the_examples_hit_and_miss(snapshot: Snapshot) -> None:
    """What the tests above take for granted."""
    device = CALLS[0].operation.describe(*CALLS[0].arguments).device
    for sizes, source in ((HITS[0], "table"), (HITS[1], "table"), (MISS, "live")):
        given = replace(context(), rows=sizes[0], hidden_size=sizes[1], device=device)
        assert lz.select(given).source == source
