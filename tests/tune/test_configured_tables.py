"""Configurations from their search to the table that ships them and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.evaluate.evaluation import evaluate
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.report.wins import kernel_wins
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.tune.clocked_device import KERNELS, ClockedDevice, run
from tests.tune.configured_kernels import PASSES
from tests.tune.synthetic_results import DEVICE, grid, norm

DEFAULT = "torch.rms_norm"
BEST = {"passes": 4, "order": "rows"}


def searched(folder: Path) -> list[Measurement]:
    store = ResultsStore(folder)
    run(ClockedDevice([DEFAULT, PASSES.kernel_id]), store, *grid(norm, (1, 8, 64), (512, 1024)))
    return list(store.read().rows)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    emit(compile_table(searched(tmp_path / "results"), KERNELS)).write(tmp_path / "tables")
    monkeypatch.setenv("LAYERZERO_TABLES", str(tmp_path / "tables"))
    return Snapshot(Registry(KERNELS), CounterGroup())


def test_a_table_serves_the_configuration_that_a_search_found(snapshot: Snapshot) -> None:
    plan = snapshot.select(norm(20).with_device(DEVICE))
    assert (plan.source, plan.kernel_id, dict(plan.configuration)) == ("table", PASSES.kernel_id, BEST)


def test_an_evaluation_measures_and_scores_the_shipped_configuration(snapshot: Snapshot, tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, PASSES.kernel_id, PUBLIC_CALL])
    contexts: list[SelectionContext] = [norm(20), norm(5000)]
    store = ResultsStore(tmp_path / "held-out")
    hit, miss = evaluate(device, snapshot, contexts, store).scores
    best = f'{PASSES.kernel_id} {{"order":"rows","passes":4}}'
    assert (hit.hit, hit.chosen, hit.best, hit.efficiency) == (True, best, best, 1.0)
    assert (miss.hit, miss.chosen, miss.best) == (False, DEFAULT, best)
    assert miss.efficiency == pytest.approx(1 / 5)
    rows = [row for row in store.read().rows if row.context == norm(20) and row.kernel_id == PASSES.kernel_id]
    assert [dict(row.configuration) for row in sorted(rows, key=lambda row: len(row.configuration))] == [{}, BEST]


def test_a_choice_whose_configuration_the_table_does_not_ship_is_timed_too(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a miss's may be, which takes it from the nearest bucket of another static key."""
    assert snapshot.tables.of(DEVICE) is not None
    monkeypatch.delenv("LAYERZERO_TABLES")
    without = Snapshot(Registry(KERNELS), CounterGroup())
    device = ClockedDevice([DEFAULT, PASSES.kernel_id, PUBLIC_CALL])
    found = evaluate(device, without, [norm(20)], ResultsStore(tmp_path / "held-out"), [snapshot])
    assert [score.chosen for score in found.scores] == [DEFAULT]
    assert [score.chosen for score in found.beside[0]] == [f'{PASSES.kernel_id} {{"order":"rows","passes":4}}']
    assert not found.unscored


def test_a_kernel_counts_once_at_a_point_whatever_its_configurations(tmp_path: Path) -> None:
    points = {line.kernel_id: (line.points, line.wins) for line in kernel_wins(searched(tmp_path))}
    assert points == {DEFAULT: (6, 0), PASSES.kernel_id: (6, 6)}
