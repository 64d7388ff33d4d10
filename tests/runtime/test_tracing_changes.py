"""What becomes of compiled functions when the snapshot changes: only what is selected otherwise is compiled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerzero_runtime as lz
from layerzero_runtime.dispatch import health, publish_snapshot, republish
from layerzero_runtime.integrations import in_force
from layerzero_runtime.integrations.in_force import IN_FORCE, Answer, name_of
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.serving.execution import STATE
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.form import TableForm
from tests.runtime.conftest import tables_in_force
from tests.runtime.traced_calls import Graphs, compiled, policy_in_force, registered

FLASH, SDPA = "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"
# Of all lengths between these, the synthetic table gives the flash kernel for square causal attention.
MEASURED = (10, 16)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return lz.attention(query, key, value, is_causal=True)


def tensors(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 5, length, 16).to(dtype) for _ in range(3)]


@pytest.fixture
def flash(snapshot: Snapshot) -> Iterator[tuple[Callable[..., Any], Graphs]]:
    """Square causal attention, compiled once, with the flash kernel in its graph."""
    with compiled(causal) as (traced, graphs):
        for length in MEASURED:
            traced(*tensors(length))
        assert graphs.functions() == [{FLASH}]
        yield traced, graphs


def denying(kernel: str, *when: Limit) -> Policy:
    return Policy(denies=(Rule(kernel=kernel, when=when),))


def test_snapshots_that_select_alike_leave_compiled_functions_alone(
    flash: tuple[Callable[..., Any], Graphs],
) -> None:
    traced, graphs = flash
    republish()
    traced(*tensors(12))
    publish_snapshot()  # The table is loaded again: another function that decides alike.
    traced(*tensors(12))
    spec = lz.KernelSpec(
        kernel_id="mine.double",
        operations=("attention.causal",),
        platforms=("cpu",),
        dtypes=("float64",),
        library="mine",
        priority=300,
    )
    elsewhere = Policy(
        denies=(Rule(operation="norm.*"), Rule(kernel="*", when=(Limit("dtype", "one_of", ("bfloat16",)),)))
    )
    with registered(spec, lambda *arguments: None), policy_in_force(elsewhere):
        traced(*tensors(12))
    lz.warmup([lz.SelectionContext.from_tensors("norm.rms", torch.randn(8, 128), torch.randn(128))])
    health().failed("torch.swiglu.in_place", "tried")
    traced(*tensors(12))
    assert len(graphs) == 1


def test_a_denied_kernel_is_in_no_graph_that_runs(flash: tuple[Callable[..., Any], Graphs]) -> None:
    traced, graphs = flash
    with policy_in_force(denying("torch.sdpa.flash_cpu")):
        traced(*tensors(12))
        assert graphs.functions()[1:] == [{SDPA}]
        with policy_in_force(denying("torch.sdpa*")):
            traced(*tensors(12))
        (operator,) = graphs.functions()[2]
        assert operator.startswith("layerzero.torch_matmul_causal_")
    traced(*tensors(12))
    assert graphs.ran == [0, 0, 1, 2, 0]


def test_a_policy_that_comes_back_brings_its_graphs_back(flash: tuple[Callable[..., Any], Graphs]) -> None:
    traced, graphs = flash
    for _ in range(3):
        with policy_in_force(denying("torch.sdpa.flash_cpu")):
            traced(*tensors(12))
        traced(*tensors(12))
    assert graphs.functions() == [{FLASH}, {SDPA}]
    assert graphs.ran == [0, 0, 1, 0, 1, 0, 1, 0]


def test_graphs_of_constant_sizes_follow_the_policy_too(snapshot: Snapshot) -> None:
    with compiled(causal, dynamic=False) as (traced, graphs):
        traced(*tensors(12))
        with policy_in_force(denying("torch.sdpa.flash_cpu")):
            traced(*tensors(12))
        with policy_in_force(denying("torch.sdpa.math")):
            traced(*tensors(12))
    assert graphs.functions() == [{FLASH}, {SDPA}]


def test_rules_about_sizes_hold_for_every_call_of_a_graph(snapshot: Snapshot) -> None:
    policy = denying("torch.sdpa.flash_cpu", Limit("seq_len_q", "at_most", 12))
    with policy_in_force(policy), compiled(causal) as (traced, graphs):
        for length in (10, 11, 12, 13, 16, 14, 12):
            traced(*tensors(length))
    assert graphs.functions() == [{SDPA}, {FLASH}]
    assert graphs.ran == [0, 0, 0, 1, 1, 1, 0]


def test_a_lock_decides_for_all_sizes(snapshot: Snapshot) -> None:
    policy = Policy(locks=(Rule(operation="attention.causal", kernel="torch.sdpa.math"),))
    with policy_in_force(policy), compiled(causal) as (traced, graphs):
        for length in (2, 3, 12, 70):
            torch.testing.assert_close(traced(*(given := tensors(length))), causal(*given))
    # The first length is that of a dimension besides, which Dynamo takes for the same.
    assert set(graphs.functions()) == {frozenset({"_scaled_dot_product_attention_math"})}
    assert len(graphs) == 1


def test_a_boost_goes_before_measurements(snapshot: Snapshot) -> None:
    policy = Policy(boosts=(Rule(kernel="torch.sdpa.math", boost=1.0),))
    with policy_in_force(policy), compiled(causal) as (traced, graphs):
        traced(*tensors(12))
    assert graphs.functions() == [{"_scaled_dot_product_attention_math"}]


def test_a_broken_kernel_is_in_no_graph_until_it_works_again(
    flash: tuple[Callable[..., Any], Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, graphs = flash
    try:
        health().failed("torch.sdpa.flash_cpu", "tried")
        traced(*tensors(12))
        monkeypatch.setattr(health(), "_clock", lambda: float("inf"))
        health().reopen_due()  # Half-open: eager calls try it, one at a time.
        traced(*tensors(12))
        causal(*tensors(12))
        traced(*tensors(12))
        health().failed("torch.sdpa.flash_cpu", "once more")
        traced(*tensors(12))
        assert graphs.functions() == [{FLASH}, {SDPA}]
        assert graphs.ran == [0, 0, 1, 1, 0, 1]
    finally:
        health().reset()


def test_another_table_makes_other_graphs(
    flash: tuple[Callable[..., Any], Graphs], synthetic_tables: tuple[Path, TableForm]
) -> None:
    traced, graphs = flash
    with tables_in_force(None):
        traced(*tensors(12))
        traced(*tensors(70))
    with tables_in_force(synthetic_tables[0]):
        traced(*tensors(12))
    assert graphs.functions() == [{FLASH}, {SDPA}]
    assert graphs.ran == [0, 0, 1, 1, 0]


def test_a_kernel_that_compiles_serves_graphs_after_warmup(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STATE, "preparation", "warmup")
    spec = lz.KernelSpec(
        kernel_id="mine.compiled",
        operations=("mlp.swiglu",),
        platforms=("cpu",),
        dtypes=("float64",),
        library="mine",
        priority=200,
        compiles=True,
    )
    gate, up = torch.randn(2, 6, 8, dtype=torch.float64)
    with (
        registered(spec, lambda gate, up: torch.nn.functional.silu(gate) * up),
        compiled(lz.swiglu) as (traced, graphs),
    ):
        before = dict(lz.stats()).get("unprepared", 0)
        traced(gate, up)
        assert lz.stats()["unprepared"] == before + 1
        assert graphs.functions() == [{"silu", "mul"}]
        lz.warmup([lz.SelectionContext.from_tensors("mlp.swiglu", gate, up)])
        traced(gate, up)
        (operator,) = graphs.functions()[1]
        assert operator.startswith("layerzero.mine_compiled_")


def test_an_answer_of_a_snapshot_that_another_has_replaced_is_asked_for_again(snapshot: Snapshot) -> None:
    kernel = snapshot.registry.get("torch.swiglu")
    assert kernel is not None
    answer = Answer(lambda gate, up: None, Choice(kernel, {}), False, lambda later: later is not snapshot)
    publish_snapshot()
    assert name_of(answer, snapshot) is None


def test_equal_answers_of_a_compilation_are_one(snapshot: Snapshot) -> None:
    known = len(in_force._answers)
    with compiled(lambda query, key, value: causal(causal(query, key, value), key, value)) as (traced, graphs):
        traced(*tensors(12))
        assert len(in_force._answers) == known + 1
    assert len(graphs) == 1


def test_a_policy_that_comes_while_dynamo_compiles_holds_from_the_next_call_on(snapshot: Snapshot) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if not graphs.traced:
            lz.set_policy(denying("torch.sdpa.flash_cpu"))
        return graphs(graph, inputs)

    graphs = Graphs()
    with policy_in_force(Policy()), compiled(causal, backend=backend) as (traced, _):
        traced(*tensors(12))
        traced(*tensors(12))
        assert graphs.functions() == [{FLASH}, {SDPA}]
        lz.set_policy(None)
        traced(*tensors(12))
    assert graphs.ran == [0, 1, 0]


def test_the_oldest_answers_give_way(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_force, "MAX_ANSWERS", 2)
    monkeypatch.setattr(in_force, "_answers", {})
    monkeypatch.setattr(in_force, "_asked_for", set())
    kernel = snapshot.registry.get("torch.swiglu")
    assert kernel is not None
    names = [
        name_of(Answer(lambda gate, up: None, Choice(kernel, {}), number, lambda later: None), snapshot)
        for number in range(3)
    ]
    assert [hasattr(IN_FORCE, str(name)) for name in names] == [False, True, True]
