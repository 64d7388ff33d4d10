"""`explain`: what it says of a hit, of a guard, of a miss, and without its file."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import NoKernelAvailableError, TableError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.form import TableForm
from tests.runtime.conftest import tables_in_force

Tables = tuple[Path, TableForm]
CPU = detect_device("cpu")
HIT = SelectionContext(operation="norm.rms", dtype="float32", rows=8, hidden_size=512, device=CPU)


def test_a_hit_names_bucket_margin_runner_up_time_and_versions(snapshot: Snapshot, synthetic_tables: Tables) -> None:
    found = lz.explain(HIT)
    assert (found.plan.kernel_id, found.plan.source) == ("torch.inductor.rms_norm", "table")
    assert list(found.bucket) == ["rows", "hidden_size", "rows * hidden_size"]
    for name, (low, high) in found.bucket.items():
        assert low <= math.prod(getattr(HIT, axis) for axis in name.split(" * ")) <= high
    assert found.evidence is not None
    # The synthetic times: the winner 10 us, the default 20, others 40.
    assert found.evidence["speedup"] == pytest.approx(2.0, rel=0.02)
    assert found.evidence["runner_up"] == "torch.rms_norm"
    assert found.evidence["margin"] == pytest.approx(1.0, rel=0.03)
    assert [8, 512] in found.evidence["points"]
    assert found.provenance["results"] == synthetic_tables[1].provenance["results"]
    text = str(found).splitlines()
    assert text[0] == "norm.rms: torch.inductor.rms_norm"
    assert text[1].startswith("  bucket: rows ")
    least = found.evidence["least_speedup"]
    assert 1.9 < least < found.evidence["speedup"]
    points = len(found.evidence["points"])
    assert text[2].endswith(f"x the default's speed (95%: at least {least:.2f}x) over {points} measured points")
    assert text[3].startswith("  runner-up: torch.rms_norm, ")
    assert text[4].startswith("  measured 2026-03-01T10:00:00+00:00, ")
    assert text[5].startswith(f"  table: {CPU.slug}, results {found.provenance['results']}, torch ")


def test_the_plan_behind_a_guard_does_not_borrow_the_evidence_of_the_first(snapshot: Snapshot) -> None:
    found = lz.explain(replace(HIT, is_contiguous=False))
    assert (found.plan.kernel_id, found.plan.source) == ("torch.rms_norm", "table")
    assert found.evidence is None
    assert found.bucket == lz.explain(HIT).bucket
    assert found.refused["torch.inductor.rms_norm"] == (
        "IS_CONTIGUOUS_NOT_ONE_OF: is_contiguous is False, required True",
    )
    assert "refused torch.inductor.rms_norm: IS_CONTIGUOUS_NOT_ONE_OF" in str(found)
    assert "the default's speed" not in str(found)


def test_a_miss_says_why_and_who_was_refused(snapshot: Snapshot) -> None:
    found = lz.explain(replace(HIT, rows=10**6))
    assert (found.plan.source, found.bucket, found.evidence) == ("live", {}, None)
    assert "live selector, because of a miss: outside the measured range: norm.rms with (1000000, 512)" in str(found)
    gradients = lz.explain(replace(HIT, requires_grad=True))
    on_cpus = {"torch.inductor.rms_norm", "torch.rms_norm.vector_norm"}
    elsewhere = {
        kernel.kernel_id
        for kernel in builtin_kernels()
        if "norm.rms" in kernel.spec.operations and "cpu" not in kernel.spec.platforms
    }
    assert "triton.rms_norm" in elsewhere
    assert set(gradients.refused) == on_cpus | elsewhere
    assert (
        "PLATFORM_NOT_ONE_OF: platform is 'cpu', required one of 'cuda', None" in gradients.refused["triton.rms_norm"]
    )
    assert [kernel_id for kernel_id in gradients.refused if f"refused {kernel_id}: " in str(gradients)] == [
        kernel_id for kernel_id in gradients.refused if kernel_id in on_cpus
    ], "kernels for other kinds of devices are left out of the text"
    with pytest.raises(NoKernelAvailableError, match="DTYPE_NOT_ONE_OF"):
        lz.explain(replace(HIT, dtype="int8"))


def test_without_a_table_it_says_so() -> None:
    with tables_in_force(None):
        found = lz.explain(HIT)
    assert (found.plan.table, dict(found.provenance)) == (None, {})
    assert f"because of a miss: no table for device {CPU.slug}" in str(found)


def test_the_evidence_may_be_missing_but_not_damaged(synthetic_tables: Tables, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(synthetic_tables[0], folder)
    evidence = folder / CPU.slug / "evidence.json"
    with tables_in_force(folder):
        evidence.unlink()
        found = lz.explain(HIT)
        assert (found.plan.source, found.evidence, found.bucket) == ("table", None, {})
        for damaged in ("{", "[]", "{}", '{"norm.rms": {}}'):
            evidence.write_text(damaged)
            with pytest.raises(TableError, match="is damaged or not of this table") as caught:
                lz.explain(HIT)
            assert str(evidence) in str(caught.value)
            assert lz.select(HIT).source == "table"
