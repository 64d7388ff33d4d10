"""Fixtures of the tuner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerzero_tune.results.store import ResultsStore
from tests.tune.measurements import make_contest


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """A store of the contests 0 to 4."""
    store = ResultsStore(tmp_path / "results")
    for number in range(5):
        store.append(make_contest(number))
    return store
