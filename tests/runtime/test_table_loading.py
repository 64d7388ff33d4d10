"""Loading a table: leaves are made at first use, and an entry that cannot be read is a miss, counted and logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from threading import Barrier, local
from typing import Any

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import TableError
from layerzero_runtime.integrations.traced_candidates import key_plan
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables import table as table_module
from layerzero_runtime.tables.table import TableStep, load_table
from layerzero_runtime.tables.table_set import TableSet
from tests.runtime.conftest import write_source
from tests.runtime.test_import import run

THREADS = 8
CPU = detect_device("cpu")
DAMAGED = SelectionContext(operation="mlp.swiglu", dtype="float32", rows=1, hidden_size=32, device=CPU)
SOUND = SelectionContext(operation="mlp.swiglu", dtype="bfloat16", rows=1, hidden_size=32, device=CPU)
COUNTED = """
import gc
from importlib import import_module
from layerzero_runtime.tables.table import TableStep, load_table

def steps():
    return [found for found in gc.get_objects() if isinstance(found, TableStep)]

import layerzero_tables
from pkgutil import iter_modules
name = min(module.name for module in iter_modules(layerzero_tables.__path__) if module.ispkg)
table = load_table(import_module(f"layerzero_tables.{name}"))
loaded = len(steps())
entry = next(iter(table.entries["attention.causal"].values()))
leaves = entry.leaves
own = {id(step) for leaf in leaves for step in leaf}
result = [loaded, {id(step) for step in steps()} == own, entry.leaves is leaves, len(leaves)]
"""


def changed_entry(source: str, change: Callable[[str], str]) -> str:
    """The table with other leaves in the entry of `DAMAGED`."""
    [name] = re.findall(r"\('eager', 'float32', \(\)\): \(mlp_swiglu_\d+, (MLP_SWIGLU_\d+)\)", source)
    begin = source.index(f"{name} = (\n") + len(f"{name} = (\n")
    end = source.index("\n)\n", begin)
    changed = change(source[begin:end])
    assert changed != source[begin:end]
    return source[:begin] + changed + source[end:]


def test_no_plan_is_made_before_its_entry_is_used_and_then_those_of_that_entry_alone() -> None:
    (before, only_its_own, kept, leaves), modules = run(COUNTED)
    assert before == 0
    assert only_its_own
    assert kept
    assert leaves > 1
    assert "torch" not in modules


def test_the_leaves_of_an_installed_table_are_what_its_literals_say(installed: Path, source: str) -> None:
    # One of the leaves gets a guard that others with its plan do not have.
    source = changed_entry(source, lambda leaves: leaves.replace(", ()),)", ", (('rows', 'at_most', 7),)),)", 1))
    module = import_module(f"{write_source(installed, source).name}.{CPU.slug}")
    table = load_table(module)
    for operation, by_key in module.ENTRIES.items():
        assert list(table.entries[operation]) == list(by_key)
        for key, (decide, chains) in by_key.items():
            entry = table.entries[operation][key]
            assert entry.decide is decide
            found = [[(step.kernel_id, step.configuration, step.guards) for step in leaf] for leaf in entry.leaves]
            assert found == [
                [(*module.PLANS[plan], tuple(Limit(*guard) for guard in guards)) for plan, guards in chain]
                for chain in chains
            ]


def in_threads(call: Callable[[], Any]) -> list[Any]:
    """What several threads that begin together get."""
    barrier = Barrier(THREADS)

    def begin(number: int) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.fixture
def threads_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads wait for each other at the first step that each of them makes."""
    barrier, make, seen = Barrier(THREADS), table_module._step, local()

    def step(*arguments: Any) -> TableStep:
        if not hasattr(seen, "has_waited"):
            seen.has_waited = True
            barrier.wait(timeout=30)
        return make(*arguments)

    monkeypatch.setattr(table_module, "_step", step)


@pytest.mark.usefixtures("threads_meet")
def test_threads_that_use_an_entry_first_get_one_answer(installed: Path, source: str) -> None:
    table = load_table(import_module(f"{write_source(installed, source).name}.{CPU.slug}"))
    entry = next(iter(table.entries["attention.causal"].values()))
    first, *others = in_threads(lambda: entry.leaves)
    assert len(first) > 1
    assert all(found == first for found in others)
    assert entry.leaves == first


DAMAGES: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda leaves: re.sub(r"\(\((\d+), ", r"((999, ", leaves, count=1), "tuple index out of range"),
    (lambda leaves: leaves.replace(", ()),", ", (('rowz', 'at_least', 1),)),", 1), "'rowz' is no field of a context"),
    (lambda leaves: leaves.replace(", ()),", ", (('rows', 'least', 1),)),", 1), "kind of a limit is 'least'"),
    (lambda leaves: leaves.replace(", ()),", ", ('rows',)),", 1), "takes 3 positional arguments"),
    (lambda leaves: leaves.replace(", ()),", ", ()), 7,", 1), "cannot unpack non-iterable int"),
    (lambda leaves: "", "no leaves"),
)


@pytest.fixture(params=DAMAGES, ids=[message for _, message in DAMAGES])
def snapshot_of_damaged(
    request: pytest.FixtureRequest, installed: Path, source: str, caplog: pytest.LogCaptureFixture
) -> tuple[Snapshot, str]:
    """A snapshot with the damaged table installed, and what is said of it."""
    caplog.set_level(logging.WARNING, "layerzero")
    damage, message = request.param
    write_source(installed, changed_entry(source, damage))
    counters = CounterGroup()
    return Snapshot(Registry(builtin_kernels()), counters, tables=TableSet(counters)), message


@pytest.mark.scenario("FS-021")
def test_an_entry_that_cannot_be_read_is_a_miss_counted_and_logged_once_and_the_others_serve(
    snapshot_of_damaged: tuple[Snapshot, str], caplog: pytest.LogCaptureFixture
) -> None:
    snapshot, message = snapshot_of_damaged
    assert snapshot.select(SOUND).source == "table"
    assert "entries_damaged" not in dict(snapshot.counters)
    for _ in range(2):
        plan = snapshot.select(DAMAGED)
        assert (plan.source, plan.entry) == ("live", None)
        assert "the entry is damaged: mlp.swiglu with ('eager', 'float32'" in (plan.miss_reason or "")
    assert dict(snapshot.counters)["entries_damaged"] == 1
    [line] = [record.getMessage() for record in caplog.records if "entry is not used" in record.getMessage()]
    assert message in line
    assert "in the entry of mlp.swiglu ('eager', 'float32', ())" in line
    assert "compile the results again" in line


@pytest.mark.usefixtures("threads_meet")
def test_threads_that_find_one_damage_count_it_once(installed: Path, source: str) -> None:
    damage, _ = DAMAGES[0]
    table = load_table(import_module(f"{write_source(installed, changed_entry(source, damage)).name}.{CPU.slug}"))
    entry = table.entries["mlp.swiglu"]["eager", "float32", ()]
    counters = CounterGroup()
    tables = TableSet(counters)
    assert in_threads(lambda: tables.is_damaged(entry)) == [True] * THREADS
    assert dict(counters) == {"entries_damaged": 1}


def test_a_call_at_a_damaged_entry_is_served_and_counted_as_a_miss(snapshot_of_damaged: tuple[Snapshot, str]) -> None:
    snapshot, _ = snapshot_of_damaged
    gate, up = torch.randn(1, 32), torch.randn(1, 32)
    route = snapshot.route(operation_named("mlp.swiglu"), DAMAGED, {})
    result = route.functions[route.decide(1, 32)](gate, up)
    torch.testing.assert_close(result, torch.nn.functional.silu(gate) * up)
    assert route.misses.value == 1
    assert dict(snapshot.counters)["entries_damaged"] == 1


def test_to_a_traced_call_a_damaged_entry_is_none(snapshot_of_damaged: tuple[Snapshot, str]) -> None:
    plan = key_plan(snapshot_of_damaged[0], operation_named("mlp.swiglu"), DAMAGED)
    assert (plan.decision, plan.chains) == (None, ())
    assert [candidate.choice.kernel.kernel_id for candidate in plan.unmeasured] == ["torch.swiglu"]


def test_a_table_knows_its_damage_when_it_is_checked(installed: Path, source: str) -> None:
    damage, _ = DAMAGES[0]
    table = load_table(import_module(f"{write_source(installed, changed_entry(source, damage)).name}.{CPU.slug}"))
    with pytest.raises(TableError, match="in the entry of mlp"):
        table.check()
