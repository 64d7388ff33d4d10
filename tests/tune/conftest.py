"""Fixtures of the tuner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerzero_tune.results.store import ResultsStore
from tests.runtime.conftest import nvml_library
from tests.tune.command import RUNTIME_FOLDER, CommandsHere
from tests.tune.measurements import make_contest
from tests.tune.recordings import record
from tests.tune.shipped_tables import OTHER_DEVICE, write_norm_table
from tests.tune.synthetic_results import DEVICE

__all__ = ["nvml_library"]


@pytest.fixture(autouse=True)
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", RUNTIME_FOLDER.name)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """A store of the contests 0 to 4."""
    store = ResultsStore(tmp_path / "results")
    for number in range(5):
        store.append(make_contest(number))
    return store


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandsHere:
    """`layerzero-tune` in this process."""
    return CommandsHere(monkeypatch, capsys)


@pytest.fixture(scope="session")
def recorded_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `recordings.recorded_rows`, to read only."""
    folder = tmp_path_factory.mktemp("recorded") / "results"
    record(folder)
    return folder


@pytest.fixture
def two_tables(tmp_path: Path) -> Path:
    """Tables of two devices."""
    for device, day in ((DEVICE, "2026-03-01"), (OTHER_DEVICE, "2026-11-04")):
        write_norm_table(tmp_path / "tables", device, day)
    return tmp_path / "tables"
