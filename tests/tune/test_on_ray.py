"""`--executor ray` on a real local cluster: two nodes, four workers in all, one of the nodes killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import Candidate, MeasurementPolicy
from layerzero_tune.results.leases import LEASES
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search import on_ray
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device import LiveDevice
from layerzero_tune.search.on_ray import LiveNode, OnRay
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.search.tuning import tune
from layerzero_tune.worker.process import WorkerProcess
from tests.tune.command import RUNTIME_FOLDER, CommandsHere
from tests.tune.ray_cluster import PLACES, SlowNode, in_flight, two_nodes
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import DEVICE, norm
from tests.tune.tuning_runs import Seen, agenda_at

pytest.importorskip("ray", reason="Ray has no wheel for this Python")
WORKLOAD = '{"operation": "norm.rms", "dtype": "float32", "rows": 32, "hidden_size": 256}\n'


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ |= {"XDG_RUNTIME_DIR": RUNTIME_FOLDER.name, "CXX": "no-such-compiler"}
    with two_nodes(DEVICE.slug, detect_device("cpu").slug) as made:
        yield made


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Twenty-four recorded contests."""
    rows = [row for row in recorded_rows() if row.context.operation == "norm.rms"]
    store = ResultsStore(tmp_path / "recorded")
    for contest_id in sorted({row.contest_id for row in rows})[:24]:
        store.append([row for row in rows if row.contest_id == contest_id])
    store.compact()
    return store.directory


def test_the_table_is_that_of_the_local_executor(
    cluster: Any, command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    compiled = []
    for executor in ("local", "ray"):
        out, tables = tmp_path / executor, tmp_path / f"tables-{executor}"
        words = ("run", "--device", f"recorded:{recorded_results}", "--ops", "norm,mlp", "--out", out, "--json")
        report = command(*words, "--executor", executor).json
        assert report["contests_measured"] == len(ResultsStore(out).contest_ids()) > 50
        assert command("compile", out, "--out", tables).status == 0
        compiled.append({path.relative_to(tables): path.read_bytes() for path in tables.rglob("*.*")})
    assert compiled[0] == compiled[1]
    assert len(compiled[0]) == 2


@pytest.mark.slow
@pytest.mark.alone
def test_workers_of_a_cluster_measure_this_cpu(cluster: Any, command: CommandsHere, tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(WORKLOAD)
    out = tmp_path / "out"
    words = ("run", "--device", "cpu", "--executor", "ray", "--workload", tmp_path / "w.jsonl", "--out", out)
    ended = command(*words)
    assert ended.status == 0, ended.errors
    assert f", {2 * PLACES} at once" in ended.errors
    rows = ResultsStore(out).read().rows
    assert {row.context.rows for row in rows} == {32}
    assert "ok" in {row.status for row in rows}
    assert all(row.device == detect_device("cpu").to_dict() for row in rows)
    # What was measured by the cluster is what this host would have measured.
    again = command(*words[:3], *words[5:], "--dry-run", "--json").json
    assert again["contests_held"] == 1


def test_a_deadline_gives_up_what_is_in_flight(cluster: Any, recording: Path, tmp_path: Path) -> None:
    seen, store, begun = Seen(), ResultsStore(tmp_path / "out"), tmp_path / "begun"
    begun.mkdir()
    device = RecordedDevice(ResultsStore(recording).read().rows)
    with OnRay(DEVICE, SlowNode(recording, 3600.0, begun)) as executor:
        agenda = agenda_at(device, device.contexts, store)
        end = tune(device, agenda, store, seen, Deadline.after(8.0), executor)
    assert len(end.skipped) == 24
    assert (len(seen.begun), len(seen.finished_contests)) == (2 * PLACES, 0)
    assert list((store.directory / LEASES).glob("*")) == []


def processes_of(node: Any) -> list[int]:
    """Its raylet and all that this has started."""
    raylet: int = node.all_processes["raylet"][0].process.pid
    return [raylet, *map(int, Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split())]


def kill_node(cluster: Any, node: Any) -> None:
    """The end of a host."""
    for pid in processes_of(node):
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


# The last one that uses the cluster, of which it leaves half.
def test_a_run_completes_although_a_node_is_killed(cluster: Any, recording: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (victim,) = cluster.worker_nodes
    seconds = 0.4
    killed_after: list[int] = []

    def kill(seen: Seen) -> None:
        count = len(seen.finished_contests)
        if count >= 8 and not killed_after and in_flight(begun, seconds, processes_of(victim)):
            killed_after.append(count)
            kill_node(cluster, victim)

    rows, seen, store = ResultsStore(recording).read().rows, Seen(kill), ResultsStore(tmp_path / "out")
    device = RecordedDevice(rows)
    with OnRay(DEVICE, SlowNode(recording, seconds, begun)) as executor:
        assert executor.slots == 2 * PLACES
        tune(device, agenda_at(device, device.contexts, store), store, seen, executor=executor)
    assert killed_after
    assert store.read().rows == rows
    finished = Counter(one.contest.contest_id for one in seen.finished_contests)
    assert set(finished.values()) == {1}
    tries = Counter(path.name.split("-")[0] for path in begun.iterdir())
    assert tries.keys() == finished.keys()
    assert 1 <= sum(tries.values()) - len(tries) <= PLACES  # what the node had in flight, no more


# Without a cluster.


@pytest.fixture
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes the place of one that Ray has started."""
    monkeypatch.setattr(on_ray, "_opened", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("on_a_node")
def test_a_node_with_another_device_is_refused() -> None:
    (contest,) = RecordedDevice(recorded_rows()).contests(recorded_rows()[0].context)
    with pytest.raises(LayerZeroError, match=r"offers the resource cpu_synthetic.*but its device is"):
        on_ray._measure_on_node(LiveNode(DEVICE, ()), contest)


@pytest.mark.usefixtures("on_a_node")
def test_a_node_with_other_kernels_or_versions_is_refused() -> None:
    spec = detect_device("cpu")
    here = LiveDevice(spec, Registry(builtin_kernels()), MeasurementPolicy(), WorkerProcess())
    (contest,) = here.contests(norm(8))
    node = LiveNode(spec, ())
    with ExitStack() as stack:
        assert node.open(stack).measures(contest)
    searching = replace(contest, policy=replace(contest.policy, rounds=0))
    unknown = replace(contest, candidates=(Candidate("not.installed"),), job_ids=("1" * 32,))
    for other in (searching, unknown, replace(contest, job_ids=("0" * 32,) * len(contest.job_ids))):
        with pytest.raises(LayerZeroError, match="would measure other kernels or versions"):
            on_ray._measure_on_node(node, other)


def test_a_node_lets_no_other_process_go_first_where_it_may() -> None:
    lowered = (
        "import os, layerzero_tune.search.on_ray as on_ray; os.nice(7); on_ray._as_important_as_others(); "
        "print(os.nice(0))"
    )
    done = subprocess.run([sys.executable, "-c", lowered], capture_output=True, text=True, check=True)
    may = os.getuid() == 0
    assert (int(done.stdout) == 0, "RAY_worker_niceness=0" in done.stderr) == (may, not may)


def test_without_a_cluster_it_says_how_to_start_one(
    command: CommandsHere, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "--device", f"recorded:{recording}", "--out", tmp_path / "out", "--executor")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = command(*words, "ray")
    assert ended.status == 1
    assert "no cluster answers" in ended.errors
    assert f"""ray start --resources '{{"{DEVICE.slug}": 1}}'""" in ended.errors
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = command(*words, "ray")
    assert ended.status == 1
    assert "pip install 'layerzero-dispatch[ray]'" in ended.errors
    ended = command(*words, "slurm")
    assert ended.status == 1
    assert "--executor is 'slurm', allowed: local, ray" in ended.errors
    assert not (tmp_path / "out").exists()


def test_a_cluster_without_the_product_says_so(cluster: Any) -> None:
    with pytest.raises(LayerZeroError, match="no node of the Ray cluster offers the resource cpu_other_cpu_avx2_2c_2t"):
        OnRay(replace(DEVICE, name="Other CPU"), LiveNode(DEVICE, ()))
