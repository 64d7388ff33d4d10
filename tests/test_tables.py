"""The shipped tables are what the results beside them compile to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.compile.self_check import check_emitted
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.worker.kernels import load_kernels

TABLES = Path(__file__).parent.parent / "tables"
FOLDERS = sorted(path.parent for path in TABLES.glob("*/evidence.json"))


@cache
def compiled(folder: Path) -> TableForm:
    return compile_table(ResultsStore(folder / "results").read().rows, load_kernels().values())


def test_there_is_a_table() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_the_committed_results_compile_to_the_committed_table(folder: Path) -> None:
    form = compiled(folder)
    emitted = emit(form)
    assert emitted.slug == folder.name
    assert emitted.module == (folder / "__init__.py").read_text(encoding="utf-8")
    assert emitted.evidence == (folder / "evidence.json").read_text(encoding="utf-8")
    assert check_emitted(form, folder) > 1000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_the_committed_evaluation_is_of_the_committed_table(folder: Path) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    form = compiled(folder)
    assert evaluation["provenance"] == json.loads(json.dumps(form.provenance))
    overall = evaluation["summaries"][-1]
    assert overall["n"] >= 200
    assert overall["hit_rate"] >= 0.95
    assert overall["efficiency_geomean"] >= 0.95
    assert overall["slower_than_default"] == 0
