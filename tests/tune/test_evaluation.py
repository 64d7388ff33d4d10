"""The evaluation of a table: what it selects is timed once, and what looks slow once more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import emit
from layerzero_tune.evaluate.evaluation import Evaluation, evaluate
from layerzero_tune.evaluate.one_table import snapshot_of
from layerzero_tune.evaluate.public_calls import KERNELS, PUBLIC_CALL
from layerzero_tune.measure.contest import Contest, ContestOutcome, JobOutcome, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import LiveDevice, rows_of
from layerzero_tune.worker.process import WorkerProcess
from tests.tune.synthetic_results import DEVICE, Times, compiled, full, grid, measured, norm

DEFAULT, FUSED, VECTOR = "torch.rms_norm", "torch.rms_norm.fused", "torch.rms_norm.vector_norm"
BUILTIN = {kernel.kernel_id: kernel for kernel in (*builtin_kernels(), *KERNELS)}


class ScriptedDevice(LiveDevice):
    """A clock that says what it is told: ns by kernel id, in the first contest of a point and in a second."""

    def __init__(self, first: Times, second: Times) -> None:
        super().__init__(DEVICE, Registry(BUILTIN.values()), MeasurementPolicy(), WorkerProcess())
        self.times = (first, second)
        self.measured: list[Contest] = []

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        self.measured.append(contest)
        wobble = (1.0, 1.001, 0.999, 1.002, 0.998, 1.0)
        jobs = []
        for candidate in contest.candidates:
            time = self.times[min(contest.repeat, 1)].get(candidate.kernel_id, 3000.0)
            if isinstance(time, str):
                jobs.append(JobOutcome(time, "as scripted"))
            else:
                jobs.append(JobOutcome("ok", "", 0.0, 1.0, time, tuple(time * factor for factor in wobble)))
        outcome = ContestOutcome(tuple(jobs), "2026-03-02T00:00:00+00:00")
        return rows_of(contest, outcome, BUILTIN, DEVICE), outcome


def current_rows(times: Times) -> list[Measurement]:
    """Results for norms of 1 to 64 rows, of these versions and sources, so that no entry is stale."""
    return [
        replace(
            row,
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(BUILTIN[row.kernel_id]),
        )
        for row in measured(grid(norm, (1, 8, 64), (512, 1024)), lambda _: times)
    ]


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    """A snapshot with a table that gives `fused` for norms of 1 to 64 rows."""
    emit(compiled(current_rows({DEFAULT: 2000.0, FUSED: 1000.0}))).write(tmp_path / "tables")
    monkeypatch.setenv("LAYERZERO_TABLES", str(tmp_path / "tables"))
    return Snapshot(Registry(builtin_kernels()), CounterGroup())


def evaluated(device: ScriptedDevice, snapshot: Snapshot, results: Path) -> Evaluation:
    return evaluate(device, snapshot, [norm(3), norm(20), norm(5000)], ResultsStore(results))


def test_every_shape_is_measured_and_scored(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ScriptedDevice({DEFAULT: 2000.0, FUSED: 1000.0, VECTOR: 800.0, PUBLIC_CALL: 1250.0}, {})
    found = evaluated(device, snapshot, tmp_path / "held-out")
    assert [(score.chosen, score.hit) for score in found.scores] == [(FUSED, True), (FUSED, True), (DEFAULT, False)]
    assert [score.efficiency for score in found.scores] == pytest.approx([0.8, 0.8, 0.4])
    assert [score.speedup for score in found.scores] == pytest.approx([2.0, 2.0, 1.0])
    assert [score.end_to_end for score in found.scores] == pytest.approx([1.6, 1.6, 1.6])
    assert found.slower == frozenset()
    first, _, last = device.measured
    anchors = {candidate.kernel_id for candidate in first.candidates if candidate.is_anchor}
    assert anchors == {FUSED, PUBLIC_CALL}, "what is chosen is timed whatever the screening says"
    assert [candidate.is_default for candidate in last.candidates if candidate.kernel_id == DEFAULT] == [True]
    assert {candidate.kernel_id for candidate in first.candidates} > {DEFAULT, FUSED, VECTOR, PUBLIC_CALL}


def test_what_comes_next_is_expected_so_that_it_can_be_compiled(snapshot: Snapshot, tmp_path: Path) -> None:
    class Foreseeing(ScriptedDevice):
        def expect(self, contests: Iterable[Contest]) -> None:
            expected.append(list(contests))

    expected: list[list[Contest]] = []
    device = Foreseeing({DEFAULT: 2000.0, FUSED: 1000.0}, {})
    evaluated(device, snapshot, tmp_path / "held-out")
    assert expected == [device.measured[1:], device.measured[2:], []]


def test_contests_that_are_held_are_not_measured_again(snapshot: Snapshot, tmp_path: Path) -> None:
    times: Times = {DEFAULT: 2000.0, FUSED: 1000.0}
    first = evaluated(ScriptedDevice(times, {}), snapshot, tmp_path / "held-out")
    again = ScriptedDevice({}, {})
    assert evaluated(again, snapshot, tmp_path / "held-out") == first
    assert again.measured == []


@pytest.mark.parametrize(("fused", "measured_again"), [(1500.0, 0), (3000.0, 2)])
def test_of_another_table_those_shapes_are_measured_at_which_another_plan_serves(
    snapshot: Snapshot, tmp_path: Path, fused: float, measured_again: int
) -> None:
    times: Times = {DEFAULT: 2000.0, FUSED: 1000.0}
    evaluated(ScriptedDevice(times, {}), snapshot, tmp_path / "held-out")
    emit(compiled(current_rows({DEFAULT: 2000.0, FUSED: fused}))).write(tmp_path / "tables")
    device = ScriptedDevice(times, {})
    evaluated(device, Snapshot(Registry(builtin_kernels()), CounterGroup()), tmp_path / "held-out")
    assert [contest.context for contest in device.measured] == [norm(3), norm(20)][:measured_again]


@pytest.mark.parametrize(("second_time", "slower"), [(1100.0, 2), (1010.0, 0)])
def test_shapes_that_look_slower_are_measured_once_more(
    snapshot: Snapshot, tmp_path: Path, second_time: float, slower: int
) -> None:
    device = ScriptedDevice({DEFAULT: 1000.0, FUSED: 1100.0}, {DEFAULT: 1000.0, FUSED: second_time})
    found = evaluated(device, snapshot, tmp_path / "held-out")
    assert [contest.repeat for contest in device.measured] == [0, 0, 0, 1, 1]
    assert len(found.slower) == slower
    assert all(score.slower_p < 0.01 for score in found.scores[:2])


def test_within_two_percent_is_not_slower(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ScriptedDevice({DEFAULT: 1000.0, FUSED: 1015.0}, {})
    assert evaluated(device, snapshot, tmp_path / "held-out").slower == frozenset()
    assert [contest.repeat for contest in device.measured] == [0, 0, 0]


def test_a_choice_that_fails_is_told_and_the_other_shapes_are_scored(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ScriptedDevice({DEFAULT: 1000.0, FUSED: "died"}, {DEFAULT: 1000.0, FUSED: "died"})
    found = evaluated(device, snapshot, tmp_path / "held-out")
    assert [score.context for score in found.scores] == [norm(5000)]
    assert [shape.context for shape in found.unscored] == [norm(3), norm(20)]
    assert all("'torch.rms_norm.fused' has no time at" in shape.reason for shape in found.unscored)
    assert all("died as scripted" in shape.reason for shape in found.unscored)


def test_another_table_meets_the_first_in_the_same_contests(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert snapshot.tables.of(DEVICE) is not None
    monkeypatch.delenv("LAYERZERO_TABLES")
    without = Snapshot(Registry(builtin_kernels()), CounterGroup())
    device = ScriptedDevice({DEFAULT: 2000.0, FUSED: 1000.0}, {})
    contexts = [norm(3), norm(20), norm(5000)]
    found = evaluate(device, snapshot, contexts, ResultsStore(tmp_path / "held-out"), [without])
    assert len(device.measured) == 3
    assert [(score.chosen, score.hit) for score in found.scores] == [(FUSED, True), (FUSED, True), (DEFAULT, False)]
    assert [(score.chosen, score.hit) for score in found.beside[0]] == [(DEFAULT, False)] * 3
    assert [score.efficiency for score in found.beside[0]] == pytest.approx([0.5] * 3)
    assert [score.end_to_end for score in found.beside[0]] == [None] * 3, "the public calls are the first table's"
    assert None not in [score.end_to_end for score in found.scores]
    anchors = {candidate.kernel_id for candidate in device.measured[0].candidates if candidate.is_anchor}
    assert anchors == {DEFAULT, FUSED, PUBLIC_CALL}


def test_a_table_that_is_alone_misses_what_another_one_knows(snapshot: Snapshot, tmp_path: Path) -> None:
    """Of the same device, which the environment names: a process that has both would go by its buckets."""
    rows = measured(grid(full, (1, 16), (64, 256)), lambda _: {"torch.sdpa": 1000.0})
    # Under another name than the one in the environment, as one that is installed has.
    folder = emit(compiled(rows)).write(tmp_path / "other").rename(tmp_path / "alone")
    other = load_table_file(folder / "__init__.py")
    placed = norm(20).with_device(DEVICE)
    assert snapshot.select(placed).kernel_id == FUSED
    plan = snapshot_of(other).select(placed)
    assert (plan.kernel_id, plan.source) == (DEFAULT, "live")


def test_graphs_come_first_and_scores_in_the_order_of_the_shapes(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ScriptedDevice({DEFAULT: 2000.0, FUSED: 1000.0}, {})
    contexts = [norm(3), replace(norm(3), mode="graph"), norm(20)]
    found = evaluate(device, snapshot, contexts, ResultsStore(tmp_path / "held-out"))
    assert [contest.context.mode for contest in device.measured] == ["graph", "eager", "eager"]
    assert [score.context for score in found.scores] == contexts


def test_a_choice_that_fails_once_is_measured_again(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ScriptedDevice({DEFAULT: 2000.0, FUSED: "failed"}, {DEFAULT: 2000.0, FUSED: 1000.0})
    found = evaluate(device, snapshot, [norm(20)], ResultsStore(tmp_path / "held-out"))
    assert [contest.repeat for contest in device.measured] == [0, 2]
    assert [score.speedup for score in found.scores] == [2.0]


def test_a_shape_is_taken_again_while_the_gpu_is_slowed_down(snapshot: Snapshot, tmp_path: Path) -> None:
    class Slowed(ScriptedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(replace(contest, repeat=0))
            ids = {row.job_id: row for row in rows}
            slowed = {"slowed": ["power cap"] if contest.repeat < 2 else []}
            again = (replace(ids[job], contest_id=contest.contest_id, gpu=slowed) for job in contest.job_ids)
            return tuple(again), outcome

    device = Slowed({DEFAULT: 2000.0, FUSED: 1000.0}, {})
    found = evaluate(device, snapshot, [norm(20)], ResultsStore(tmp_path / "held-out"))
    assert len(ResultsStore(tmp_path / "held-out").contest_ids()) == 2
    assert [score.efficiency for score in found.scores] == [1.0]
