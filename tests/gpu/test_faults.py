"""A run on a GPU that two kernels break: each costs one measurement, all else is complete."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from layerzero_tune.results.store import ResultsStore
from tests.tune.command import tune

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.gpu.faulty_kernels import SPINS, SPINS_AT, WRITES_ASTRAY, WRITES_ASTRAY_AT

ROWS = (16, SPINS_AT, 48, WRITES_ASTRAY_AT, 96)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_hang_and_an_illegal_access_cost_one_measurement_each(mode: str, tmp_path: Path) -> None:
    workload = tmp_path / "workload.jsonl"
    point = {"operation": "norm.rms", "dtype": "bfloat16", "mode": mode, "hidden_size": 1024}
    workload.write_text("".join(json.dumps(point | {"rows": rows}) + "\n" for rows in ROWS))
    command = ("run", "--device", "cuda:0", "--workload", workload, "--kernels", "tests.gpu.faulty_kernels")
    done = tune(*command, "--budget", "150s", "--out", tmp_path / "results", "--json")
    assert done.returncode == 0, done.stderr
    rows = [row for row in ResultsStore(tmp_path / "results").read().rows if not row.is_search]
    broken = [(row.kernel_id, row.context.rows, row.status) for row in rows if row.status != "ok"]
    assert sorted(broken) == [(SPINS, SPINS_AT, "timeout"), (WRITES_ASTRAY, WRITES_ASTRAY_AT, "device_error")]
    timed = Counter(row.context.rows for row in rows if row.kernel_id == "torch.rms_norm" and row.samples_ns)
    assert set(timed) == set(ROWS)
