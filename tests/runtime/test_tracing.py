"""Calls inside torch.compile: a graph holds the chosen kernel and nothing of the choice; one graph per kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table import MISS
from tests.runtime.call_examples import each_call, rows
from tests.runtime.public_calls import PublicCall
from tests.runtime.traced_calls import TRACED, compiled, on_tensors


@each_call
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_traced_call_gives_what_an_eager_one_gives(call: PublicCall, dynamic: bool, served: Snapshot) -> None:
    function, tensors = on_tensors(call)
    with compiled(function, dynamic=dynamic) as (traced, graphs):
        call.assert_right(traced(*tensors))
        assert len(graphs) == 1


def test_the_graph_holds_the_chosen_kernels_and_no_trace_of_the_choice(shared_snapshot: Snapshot) -> None:
    def layer(query: Any, key: Any, value: Any, weight: Any) -> Any:
        attended = lz.attention(query, key, value, is_causal=True)
        return lz.rms_norm(attended, weight)

    query, key, value = (torch.randn(1, 5, 16, 16) for _ in range(3))
    context = OPERATIONS["attention.causal"].describe(query, key, value)
    assert lz.select(context).kernel_id == "torch.sdpa.flash_cpu"
    with compiled(layer) as (traced, graphs):
        traced(query, key, value, torch.ones(16))
    (graph,) = graphs.traced
    called = [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    flash, item, norm = called
    assert flash is torch._scaled_dot_product_flash_attention_for_cpu
    assert item.__name__ == "getitem"
    assert norm is torch.rms_norm


@dataclass(frozen=True)
class Sweep:
    """Calls of one size after another."""

    operation: str
    function: Callable[..., Any]
    sizes: Iterable[int]
    tensors: Callable[[int], tuple[torch.Tensor, ...]]

    def plan(self, size: int) -> str:
        """What is in the graph for the size: the table's kernel or what stands for it, for a miss the default."""
        plan = lz.select(self.context(size))
        kernel = current_snapshot().registry.get(plan.kernel_id)
        assert kernel is not None
        is_miss = plan.source == "live"
        return OPERATIONS[self.operation].default_kernel if is_miss else kernel.spec.traced_as or kernel.kernel_id

    def leaf(self, size: int) -> int:
        plan = lz.select(self.context(size))
        return MISS if plan.entry is None else plan.entry[1]

    def context(self, size: int) -> SelectionContext:
        return SelectionContext.from_tensors(self.operation, *self.tensors(size))


def _qkv(length_q: int, length_k: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> Any:
    sizes = ((heads, length_q), (kv_heads, length_k), (kv_heads, length_k))
    return tuple(torch.randn(1, count, length, 16).to(dtype) for count, length in sizes)


SWEEPS = {
    "causal": Sweep(
        "attention.causal",
        lambda query, key, value: lz.attention(query, key, value, is_causal=True),
        range(2, 80, 3),
        lambda length: _qkv(length, length, 5, 5),
    ),
    "full": Sweep(
        "attention.full",
        lambda query, key, value: lz.attention(query, key, value, enable_gqa=True),
        range(2, 80, 3),
        lambda length: _qkv(length, length, 10, 5, torch.bfloat16),
    ),
    "cross": Sweep(
        "attention.cross",
        lambda query, key, value: lz.attention(query, key, value, enable_gqa=True),
        range(2, 160, 6),
        lambda length: _qkv(1, length, 10, 5),
    ),
    "rms_norm": Sweep(
        "norm.rms",
        lambda x, weight: lz.rms_norm(x, weight),
        range(2, 300, 11),
        lambda count: (rows(count, 100), rows(100)),
    ),
    "swiglu": Sweep(
        "mlp.swiglu",
        lambda gate, up: lz.swiglu(gate, up),
        range(2, 300, 11),
        lambda count: (rows(count, 90), rows(count, 90)),
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_compiles_once_per_kernel_entered(name: str, shared_snapshot: Snapshot) -> None:
    sweep = SWEEPS[name]
    plans = [sweep.plan(size) for size in sweep.sizes]
    leaves = {sweep.leaf(size) for size in sweep.sizes}
    with compiled(sweep.function) as (traced, graphs):
        for size in sweep.sizes:
            tensors = sweep.tensors(size)
            torch.testing.assert_close(traced(*tensors), sweep.function(*tensors), atol=1e-2, rtol=1e-2)
    assert MISS in leaves
    assert len(leaves) >= len(graphs) == len(set(plans))
    for plan, functions in zip(dict.fromkeys(plans), graphs.functions(), strict=True):
        if plan in TRACED:
            assert TRACED[plan] <= functions
            assert not any(function.startswith("layerzero") for function in functions)
        else:
            assert [function.startswith(f"layerzero.{plan.replace('.', '_')}_") for function in functions] == [True]


def test_static_features_hold_for_every_call_of_a_graph(shared_snapshot: Snapshot) -> None:
    """The table knows head_dim 16 and no other, and another plan for grouped heads."""

    def calls() -> Iterable[tuple[torch.Tensor, ...]]:
        for heads, kv_heads, head_dim in ((5, 5, 16), (6, 6, 16), (5, 5, 24), (6, 3, 16), (5, 5, 16), (10, 5, 16)):
            sizes = (heads, kv_heads, kv_heads)
            yield tuple(torch.randn(1, count, 12, head_dim) for count in sizes)

    with compiled(partial(lz.attention, is_causal=True, enable_gqa=True)) as (traced, graphs):
        for query, key, value in calls():
            expected = lz.attention(query, key, value, is_causal=True, enable_gqa=True)
            torch.testing.assert_close(traced(query, key, value), expected)
    flash, default, grouped = graphs.functions()
    assert flash == TRACED["torch.sdpa.flash_cpu"]
    assert default == TRACED["torch.sdpa"]
    assert grouped == TRACED["torch.sdpa.math"]


def test_sizes_that_are_given_as_constants_make_graphs_of_their_own(shared_snapshot: Snapshot) -> None:
    """Without dynamic sizes a miss is served as an eager one: by what the live selector prefers at these sizes."""
    x, weight = rows(8, 128).double(), rows(128).double()
    with compiled(lambda x, weight: lz.rms_norm(x, weight), dynamic=False) as (traced, graphs):
        for count in (3, 4):
            traced(x[:count], weight)
    assert len(graphs) == 2


def test_the_first_call_of_a_process_may_be_a_traced_one() -> None:
    program = """
import torch, layerzero_runtime as lz
traced = torch.compile(lambda x, weight: lz.rms_norm(x, weight), fullgraph=True, backend="eager")
x, weight = torch.randn(3, 8), torch.randn(8)
torch.testing.assert_close(traced(x, weight), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
print(lz.stats()["traced"], lz.stats()["calls"])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "1 0\n", run.stderr


def test_inductor_compiles_what_was_traced(shared_snapshot: Snapshot) -> None:
    def layer(query: Any, key: Any, value: Any, weight: Any) -> Any:
        attended = lz.attention(query * 2, key, value, is_causal=True)
        return lz.swiglu(lz.rms_norm(attended, weight), attended)

    tensors = (*(torch.randn(1, 5, 11, 16) for _ in range(3)), torch.randn(16))
    with compiled(layer, backend="inductor") as (traced, _):
        torch.testing.assert_close(traced(*tensors), layer(*tensors))
