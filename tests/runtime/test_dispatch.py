"""What is counted, logged and explained; what happens to kernels that are stale, missing or do not load."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import KernelExecutionError, NoKernelAvailableError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.form import TableForm
from layerzero_tune.workload.lines import parse_line
from tests.runtime.conftest import registry_in_force, tables_in_force

IN_PLACE, INDUCTOR, DEFAULT = "torch.swiglu.in_place", "torch.inductor.swiglu", "torch.swiglu"


def swiglu_context(rows: int, hidden_size: int, **changes: Any) -> SelectionContext:
    return SelectionContext(
        operation="mlp.swiglu",
        rows=rows,
        hidden_size=hidden_size,
        device=detect_device("cpu"),
        **{"dtype": "float32", **changes},
    )


# Measured cells of the synthetic table, by the kernel that wins there.
SMALL, MIDDLE, LARGE = (1, 32), (8, 512), (256, 512)
# Beyond the reach of every measured bucket.
FAR = (8192, 32)


def swiglu(rows: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
    """A call and a check of its result."""
    gate, up = torch.randn(rows, hidden_size).to(dtype), torch.randn(rows, hidden_size).to(dtype)
    torch.testing.assert_close(lz.swiglu(gate, up), silu(gate) * up)


def changes(before: dict[str, int]) -> dict[str, int]:
    """Which counters have changed by how much, but for those of the live cache."""
    after = {name: value for name, value in lz.stats().items() if not name.startswith("live_cache")}
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "layerzero"]


class Failing:
    """A loader that fails; `kernel` tells where its source is looked for."""

    def __init__(self, kernel: Kernel) -> None:
        self.__code__ = kernel.load.__code__
        self.attempts = 0

    def __call__(self, context: SelectionContext, configuration: Configuration) -> KernelFunction:
        self.attempts += 1
        raise ImportError("no symbol of that name")


@contextmanager
def kernels_in_force(*kernels: Kernel) -> Iterator[Snapshot]:
    """A snapshot with these kernels in place of the builtin ones of their ids, or beside them."""
    registered = {kernel.kernel_id: kernel for kernel in (*builtin_kernels(), *kernels)}
    with registry_in_force(Registry(registered.values())) as snapshot:
        yield snapshot


def kernel_named(kernel_id: str) -> Kernel:
    [kernel] = [kernel for kernel in builtin_kernels() if kernel.kernel_id == kernel_id]
    return kernel


def test_the_table_decides(snapshot: Snapshot) -> None:
    for sizes, kernel_id in ((SMALL, IN_PLACE), (MIDDLE, INDUCTOR), (LARGE, DEFAULT)):
        plan = lz.select(swiglu_context(*sizes))
        assert (plan.kernel_id, plan.source, plan.available, plan.miss_reason) == (kernel_id, "table", True, None)
        assert plan.table == detect_device("cpu").slug


def test_hits_misses_and_what_is_not_described_are_counted(snapshot: Snapshot) -> None:
    before = lz.stats()
    for _ in range(3):
        swiglu(*SMALL)
    swiglu(*LARGE)
    for _ in range(2):
        swiglu(1000, 32)
    assert changes(before) == {"calls": 6, "hits": 4, "misses": 2}
    swiglu(0, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lz.swiglu(torch.randn(4, 4), torch.randn(4, 4))
    assert changes(before) == {"calls": 6, "hits": 4, "misses": 2, "empty": 1, "intercepted": 1}


def test_the_first_miss_of_a_kind_is_logged_once(snapshot: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    for rows in (1000, 1000, 2000):
        swiglu(rows, 32)
    [line] = lines(caplog)
    assert "first miss of its kind: outside the measured range: mlp.swiglu with (1000, 32); torch.swiglu serves" in line
    # What it says to add to a workload is a line of a workload.
    text = line.split("tune: ")[1]
    assert parse_line(text).context == swiglu_context(1000, 32)
    swiglu(4, 32, torch.float64)
    swiglu(4, 32, torch.float64)
    assert len(lines(caplog)) == 2
    assert "not measured: mlp.swiglu" in lines(caplog)[1]
    swiglu(*SMALL)
    assert len(lines(caplog)) == 2


@contextmanager
def changed_table(folder: Path, kernel_id: str, field: str, value: str, to: Path) -> Iterator[Snapshot]:
    """The table with another identity of a kernel, as if it had been measured with that."""
    slug = detect_device("cpu").slug
    source = (folder / slug / "__init__.py").read_text(encoding="utf-8")
    [line] = [line for line in source.splitlines() if line.startswith(f"    '{kernel_id}': {{")]
    identity = {**eval(line.split(": ", 1)[1].rstrip(",")), field: value}
    (to / slug).mkdir()
    changed = source.replace(line, f"    '{kernel_id}': {identity!r},")
    (to / slug / "__init__.py").write_text(changed, encoding="utf-8")
    with tables_in_force(to) as snapshot:
        yield snapshot


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", "1.13", rf"measured with torch 1\.13, installed is \d\.\d+ \({IN_PLACE}\)"),
        ("source", "0" * 32, rf"code has changed since it was measured \({IN_PLACE}\)"),
    ],
)
def test_stale_entries_give_way(
    field: str,
    value: str,
    reason: str,
    synthetic_tables: tuple[Path, TableForm],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    stale_before = lz.stats().get("stale_kernels", 0)
    with changed_table(synthetic_tables[0], IN_PLACE, field, value, tmp_path):
        for _ in range(2):
            plan = lz.select(swiglu_context(*SMALL))
            assert (plan.source, plan.kernel_id) == ("live", DEFAULT)
            assert plan.miss_reason == "no plan of the entry is legal, current and allowed for this call of mlp.swiglu"
            swiglu(*SMALL)
            # Others of the table are as good as before.
            swiglu(*LARGE)
        found = lz.stats()
        assert (found["misses"], found["hits"], found["stale_kernels"] - stale_before) == (2, 2, 1)
    stale = [line for line in lines(caplog) if "are stale" in line]
    assert len(stale) == 1
    assert re.search(reason, stale[0])


def test_a_kernel_that_is_not_registered_gives_way(snapshot: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    others = Registry(kernel for kernel in builtin_kernels() if kernel.kernel_id != IN_PLACE)
    reduced = Snapshot(others, CounterGroup())
    assert reduced.select(swiglu_context(*SMALL)).kernel_id == DEFAULT
    assert (
        f"are stale, the next plan or the live selector serves in their place: not registered ({IN_PLACE})"
        in lines(caplog)[0]
    )
    assert dict(reduced.counters) == {"stale_kernels": 1}


@pytest.mark.scenario("FS-015")
def test_a_kernel_that_does_not_load_gives_way_to_the_next_plan(
    snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind Inductor's kernel, which needs contiguous tensors, the table has the default."""
    caplog.set_level(logging.WARNING, "layerzero")
    failing = Failing(kernel_named(INDUCTOR))
    before = lz.stats()
    with kernels_in_force(replace(kernel_named(INDUCTOR), load=failing)):
        for _ in range(3):
            swiglu(*MIDDLE)
        assert failing.attempts == 1
        assert changes(before) == {"calls": 3, "hits": 3, "fallbacks": 1}
        assert lz.stats().broken == (INDUCTOR,)
        assert lz.select(swiglu_context(*MIDDLE)).kernel_id == DEFAULT
        swiglu(3, 500)
        assert failing.attempts == 1
    [line] = lines(caplog)
    assert f"{INDUCTOR} failed to load: ImportError: no symbol of that name" in line
    assert f"{DEFAULT} serves" in line


def test_a_leaf_of_which_nothing_loads_is_a_miss(snapshot: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    failing = Failing(kernel_named(IN_PLACE))
    before = lz.stats()
    with kernels_in_force(replace(kernel_named(IN_PLACE), load=failing)):
        for _ in range(3):
            swiglu(*SMALL)
        assert failing.attempts == 1
        # The first call was a hit whose kernel failed.
        assert changes(before) == {"calls": 3, "hits": 1, "misses": 2, "fallbacks": 1}
    assert len(lines(caplog)) == 2
    assert "no plan of the entry is legal, current and allowed" in lines(caplog)[1]
    assert "torch.swiglu serves" in lines(caplog)[1]


@pytest.mark.scenario("FS-017")
def test_what_the_live_selector_prefers_gives_way_to_the_default(
    snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    spec = KernelSpec(
        kernel_id="test.better", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",), priority=200
    )
    failing = Failing(kernel_named(IN_PLACE))
    before = lz.stats()
    with kernels_in_force(Kernel(spec, failing)):
        assert lz.select(swiglu_context(*FAR)).kernel_id == "test.better"
        for _ in range(3):
            swiglu(*FAR)
        assert failing.attempts == 1
        assert changes(before) == {"calls": 3, "misses": 3, "fallbacks": 1}
        refused = lz.explain(swiglu_context(*FAR)).refused["test.better"]
        assert any("BROKEN: failed 1 times" in reason for reason in refused)
    assert sum("failed to load" in line for line in lines(caplog)) == 1


def test_without_the_default_the_error_is_raised(snapshot: Snapshot) -> None:
    failing = replace(kernel_named(DEFAULT), load=Failing(kernel_named(DEFAULT)))
    gate = torch.randn(1000, 32)
    with registry_in_force(Registry([failing])):
        for _ in range(2):
            with pytest.raises(KernelExecutionError, match=r"torch.swiglu failed to load: ImportError"):
                lz.swiglu(gate, gate)
        assert lz.stats().broken == ()
    with registry_in_force(Registry([])):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(KernelExecutionError, match=r"torch.swiglu, the default of mlp.swiglu, is not registered"),
        ):
            lz.swiglu(gate, gate)
        with pytest.raises(NoKernelAvailableError, match=r"no kernel is registered for 'mlp.swiglu'"):
            lz.swiglu(gate, gate)


def test_without_its_compiler_a_plan_says_so_and_the_next_serves(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing_requirement.cache_clear()
    try:
        plan = lz.select(swiglu_context(*MIDDLE))
        assert (plan.kernel_id, plan.source, plan.available) == (INDUCTOR, "table", False)
        assert "no-such-compiler" in str(plan.unavailable_reason)
        assert "not available here: the C++ compiler 'no-such-compiler'" in str(lz.explain(swiglu_context(*MIDDLE)))
        before = lz.stats()
        swiglu(*MIDDLE)
        assert changes(before) == {"calls": 1, "hits": 1, "fallbacks": 1}
    finally:
        missing_requirement.cache_clear()


@pytest.mark.scenario("FS-030")
def test_select_refuses_what_it_cannot_place() -> None:
    for operation, message in (("mlp.gelu", "operation is 'mlp.gelu', known operations: "), ("norm.rms", "needs rows")):
        with pytest.raises(ValueError, match=message):
            lz.select(SelectionContext(operation=operation, dtype="float32", hidden_size=4))


def test_select_fills_in_the_device(snapshot: Snapshot) -> None:
    given = replace(swiglu_context(*SMALL), device=None)
    assert lz.select(given).kernel_id == lz.explain(given).plan.kernel_id
    assert json.dumps(given.to_dict())
