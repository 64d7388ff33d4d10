"""Performance, PS-001 to PS-005, PS-015, PS-016, PS-019, PS-027, PS-035: the work that a selection does.

The times themselves are printed by `scripts/bench_selection.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot
from tests.scenarios.conftest import H100, attention, beside_builtin, kernel, only
from tests.scenarios.watching import entered, judgements, measured_tables, of_the_package

GATE, UP = torch.randn(1, 32), torch.randn(1, 32)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Snapshot]:
    with measured_tables(tmp_path) as snapshot:
        yield snapshot


def hit() -> torch.Tensor:
    """A call that the table answers, at a leaf without guards."""
    return lz.swiglu(GATE, UP)


@pytest.mark.scenario("PS-001")
def test_the_first_selection_imports_no_library_and_compiles_nothing() -> None:
    code = """
import sys
import layerzero_runtime as lz
context = lz.SelectionContext(operation="attention.full", dtype="float32", batch_size=4, seq_len_q=512, num_heads=16,
                              head_dim=64)
plan = lz.select(context)
assert plan.kernel_id.startswith("torch.") and plan.available, plan
# Known to be there without being imported; adapters are a few files of declarations.
heavy = {"torch", "numpy", "yaml", "subprocess", "asyncio"} & set(sys.modules)
assert not heavy, heavy
from layerzero_runtime import dispatch
snapshot = dispatch.current_snapshot()
lz.select(context)
assert dispatch.current_snapshot() is snapshot
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.scenario("PS-002")
def test_a_repeated_selection_judges_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with only(kernel("a.one"), kernel("b.two", max_head_dim=32)) as snapshot:
        judged = judgements(monkeypatch, tuple(snapshot.registry))
        first = lz.select(attention())
        assert judged == {"a.one": 1, "b.two": 1}
        for _ in range(50):
            assert lz.select(attention()) == replace(first, cached=True)
        assert judged == {"a.one": 1, "b.two": 1}
        assert (snapshot.live_cache.computed.value, snapshot.live_cache.hits.value) == (1, 50)


@pytest.mark.scenario("PS-003")
def test_a_miss_judges_each_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The legal ones, the refused ones and a broken one alike; nothing of another operation."""
    kernels = [kernel(f"some.k{number}", max_head_dim=32 + number) for number in range(60)]
    others = [kernel(f"other.k{number}", operations=("norm.rms",)) for number in range(20)]
    with only(*kernels, *others) as snapshot:
        dispatch.health().failed("some.k50", "test")
        judged = judgements(monkeypatch, tuple(snapshot.registry))
        assert lz.select(attention()).kernel_id == "some.k32"
        assert judged == Counter({each.kernel_id: 1 for each in kernels})


def rules_about(dtype: str, count: int) -> Policy:
    """Rules of all kinds about calls in this dtype."""
    when = (Limit("dtype", "one_of", (dtype,)),)
    rules = [Rule(operation="mlp.*", kernel=f"k{number}.*", when=when, boost=1.0) for number in range(count // 4)]
    return Policy(locks=tuple(rules), allows=tuple(rules), denies=tuple(rules), boosts=tuple(rules))


@pytest.mark.scenario("PS-004")
def test_rules_are_decided_once_for_all_calls_that_share_their_features(
    table: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., object]:
        original = getattr(Rule, name)

        def counting(*arguments: object) -> object:
            evaluated[name] += 1
            return original(*arguments)

        return counting

    for name in ("applies", "applies_by", "covers"):
        monkeypatch.setattr(Rule, name, counted(name))
    hits = lz.stats()["hits"]
    lz.set_policy(rules_about("bfloat16", 100))
    hit()
    assert evaluated == {"applies_by": 100}
    for sizes in ((1, 32), (256, 512), (1, 32), (1, 32), (256, 512)):
        gate = torch.randn(sizes)
        torch.testing.assert_close(lz.swiglu(gate, gate), silu(gate) * gate)
    assert evaluated == {"applies_by": 100}
    assert lz.stats()["hits"] - hits == 6
    # The calls that the rules are about are decided by them, one by one.
    wide = torch.randn(1, 32).bfloat16()
    with pytest.raises(lz.NoKernelAvailableError, match="POLICY_NOT_ALLOWED"):
        lz.swiglu(wide, wide)
    assert evaluated["applies"] > 0


@pytest.mark.scenario("PS-005")
def test_candidates_are_found_without_looking_at_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("norm.rms", "norm.layer", "mlp.swiglu", "mlp.geglu", "attention.causal")
    kernels = [kernel(f"k.n{number}", operations=(names[number % 5],)) for number in range(998)]
    kernels += [kernel("k.full", operations=("attention.full",)), kernel("k.both", operations=("attention.full",))]
    registry = Registry(kernels)
    found = registry.candidates("attention.full")
    assert [each.kernel_id for each in found] == ["k.both", "k.full"]
    # An index, not a search: the very same object at each lookup, and for an operation without kernels nothing.
    assert registry.candidates("attention.full") is found
    assert registry.candidates("attention.cross") == ()
    assert entered(lambda: registry.candidates("attention.full"))[-1] == ("", "get")
    assert len(entered(lambda: registry.candidates("attention.full"))) == 2
    with only(*kernels):
        judged = judgements(monkeypatch, kernels)
        lz.select(attention())
        assert judged == {"k.both": 1, "k.full": 1}


@pytest.mark.scenario("PS-015", "PS-027")
def test_a_hit_describes_nothing_and_asks_no_selector(table: Snapshot) -> None:
    torch.testing.assert_close(hit(), silu(GATE) * UP)
    functions = of_the_package(entered(hit))
    modules = {module.removeprefix("layerzero_runtime.") for module, _ in functions}
    # The public function and the kernel; between them at most the snapshot's reference, and whether torch intercepts.
    assert {"calls.mlp", "kernels.torch_activation"} <= modules
    assert modules <= {"calls.mlp", "kernels.torch_activation", "calls.interception", "dispatch"}
    assert len(functions) <= 10
    [route] = table._routes.values()
    # With the sizes in hand a selection is the table's decision and one subscript.
    decided = entered(lambda: route.functions[route.decide(1, 32)])
    assert [name for _, name in decided] == [route.decide.__name__]


@pytest.mark.scenario("PS-016")
def test_a_hit_does_the_same_work_each_time_and_reads_no_clock(table: Snapshot) -> None:
    """So a slower processor makes it slower in proportion, and no timeout turns that into something else."""
    context = attention(device=H100)
    with beside_builtin(kernel("a.one", priority=200)):
        for call in (hit, lambda: lz.select(context)):
            call()
            call()
            usual = entered(call)
            assert usual
            assert all(entered(call) == usual for _ in range(100))
            clocks = {"time", "monotonic", "perf_counter", "perf_counter_ns", "sleep", "wait", "acquire", "__enter__"}
            assert not clocks & {name for _, name in usual}


@pytest.mark.scenario("PS-019")
def test_a_kernel_that_becomes_slower_is_neither_broken_nor_replaced() -> None:
    """Throttling costs what it costs: no limit of time turns it into a cliff of retries."""
    pauses = [0.0, 0.001, 0.01, 0.05]
    served: list[float] = []

    def throttled(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        pause = pauses[len(served)]
        served.append(pause)
        time.sleep(pause)
        return silu(gate) * up

    gate = torch.randn(3, 7, dtype=torch.float64)
    changes: dict[str, Any] = {
        "operations": ("mlp.swiglu",),
        "platforms": ("cpu",),
        "dtypes": ("float64",),
        "priority": 200,
    }
    before = lz.stats()["fallbacks"]
    with beside_builtin(kernel("my.throttled", throttled, **changes)):
        for _ in pauses:
            torch.testing.assert_close(lz.swiglu(gate, gate), silu(gate) * gate)
        counted = lz.stats()
    assert served == pauses
    assert (counted["fallbacks"] - before, counted.broken) == (0, ())


@pytest.mark.scenario("PS-035")
def test_counting_a_hit_is_one_call_into_c(table: Snapshot, tmp_path: Path) -> None:
    hit()
    [route] = table._routes.values()
    # A method of an itertools.count: no Python function is entered, no lock taken, nothing allocated but the number.
    assert type(route.calls.raise_by_one).__name__ == "method-wrapper"
    assert entered(route.calls.raise_by_one) == []
    calls = lz.stats()["calls"]
    hit()
    assert all(module != "layerzero_runtime.counters" for module, _ in entered(hit))
    before = entered(hit)
    assert lz.stats()["calls"] == calls + 3
    # What misses are recorded for costs a hit nothing; recording hits as well is what describes every call.
    lz.record_workload(str(tmp_path / "misses.jsonl"))
    hit()
    assert entered(hit) == before
    lz.record_workload(str(tmp_path / "all.jsonl"), hits=True)
    hit()
    assert len(entered(hit)) > len(before)
    lz.record_workload(None)
    assert (tmp_path / "misses.jsonl").read_text() == ""
    assert "mlp.swiglu" in (tmp_path / "all.jsonl").read_text()
